"""A made-up corpus for proofs: documents of given lengths, tokens drawn at random, in memory."""

from collections.abc import Sequence

import numpy as np

from armillary.train.data.cache import digest
from armillary.train.data.config import DataConfig
from armillary.train.data.corpus import Corpus
from armillary.train.data.dataset import Dataset
from armillary.train.data.tokenizer import byte_tokenizer


def specimen(config: DataConfig, lengths: Sequence[int]) -> Dataset:
    """A dataset of documents of these lengths in tokens, their end included; each at least 1.

    Packed, shuffled and repeated as any other. Its tokens are below 257, the vocabulary of `bytes`.

    Args:
        config: sequence length and seed; sources, tokenizer and cache are ignored, and nothing is held out.
    """
    tokenizer = byte_tokenizer()
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    bits = np.random.Philox(np.random.SeedSequence([config.seed, len(lengths)])).random_raw(int(offsets[-1]))
    tokens = (bits % 256).astype(np.uint16)
    tokens[offsets[1:] - 1] = tokenizer.end_of_document
    hashes = np.full(len(lengths), 2**64 - 1, dtype=np.uint64)
    num_bytes = np.asarray(lengths, dtype=np.int64) - 1
    corpus = Corpus(tokens, offsets, hashes, num_bytes, digest("specimen", list(lengths), config.seed))
    return Dataset(config, tokenizer, [corpus])
