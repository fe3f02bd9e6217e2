"""Batches of packed sequences from tokenised sources, mixed by weight and shuffled. Imports no torch.

The sequence number n of a run is a pure function of the config and n. So a run's place in its data is one number, the
cursor, and it goes on exactly where it was, on any number of ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from armillary.train.data.cache import Report, cache_folder, digest, open_or_build
from armillary.train.data.config import DataConfig
from armillary.train.data.corpus import VERSION, Corpus, open_corpus, sample, threshold, tokenise
from armillary.train.data.mixture import mix
from armillary.train.data.packing import (
    IGNORE,
    Layout,
    Sequence,
    assign,
    count_sequences,
    cut,
    lay_out,
    placeholder,
    shuffled,
)
from armillary.train.data.sources import find
from armillary.train.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

LEARNT_BYTES = 8 << 20
"""How much text a tokenizer learns from, in all sources together."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one rank; arrays of (batch, L)."""

    tokens: np.ndarray
    """int64."""
    labels: np.ndarray
    """int64: the next token of the same document; IGNORE where there is none."""
    positions: np.ndarray
    """int64: 0 at the start of the sequence and of each document in it."""
    documents: np.ndarray
    """int32: ordinal of the document in its sequence; attention never crosses it."""


class Size(NamedTuple):
    """How much text there is."""

    documents: int
    tokens: int
    num_bytes: int


class Dataset:
    """A config's tokens, opened; made by `prepare`."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, corpora: list[Corpus]) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        """Rows that the embedding needs."""
        self._pad = tokenizer.end_of_document
        self._length = config.sequence_length
        masks = [_held_out(corpus, config.held_out) for corpus in corpora]
        seeds = [(config.seed, number) for number in range(len(corpora))]
        self._train = [
            _Pool(corpus, ~held, self._length, seed) for corpus, held, seed in zip(corpora, masks, seeds, strict=True)
        ]
        self._held_out = [_Pool(corpus, held, self._length, None) for corpus, held in zip(corpora, masks, strict=True)]
        self._mixture = mix(source.weight for source in config.sources)
        self.train_size = _total(pool.size for pool in self._train)
        """Documents, tokens and bytes of one pass over every source."""
        self.held_out_size = _total(pool.size for pool in self._held_out)
        """Documents, tokens and bytes of the held-out split."""
        self._held_out_bounds = np.cumsum([0, *(pool.num_sequences for pool in self._held_out)])
        self.num_held_out = int(self._held_out_bounds[-1])
        """Sequences of the held-out split; 0 where the corpus is too small to spare a document."""
        self._held_out_order = shuffled(self.num_held_out, 0)
        self.fingerprint = digest(
            *(VERSION, self._length, config.held_out, config.seed, self._mixture.parts.tolist()),
            *(tokenizer.vocab_size, self._pad, [corpus.digest for corpus in corpora]),
        )
        """Equal for two datasets only if every sequence is; independent of paths, times and the cache."""

    def sequence(self, index: int) -> Sequence:
        """Training sequence `index`, from 0 without end: a source that is used up starts over in another order."""
        source, place = self._mixture.place(index)
        pool = self._train[source]
        epoch, rest = divmod(place, pool.num_sequences)
        return pool.sequence(rest, epoch, self._pad)

    def held_out_sequence(self, index: int) -> Sequence:
        """Held-out sequence `index`, below `num_held_out`; any first few of them are a sample of all sources."""
        place = int(self._held_out_order[index])
        source = int(np.searchsorted(self._held_out_bounds, place, side="right")) - 1
        return self._held_out[source].sequence(place - int(self._held_out_bounds[source]), 0, self._pad)

    def label_bytes(self, labels: np.ndarray) -> int:
        """UTF-8 bytes of text that the labels stand for: the divisor of bits per byte."""
        return int(self.tokenizer.byte_lengths[labels[labels != IGNORE]].sum())


class _Pool:
    """The documents of one split of one source."""

    def __init__(self, corpus: Corpus, mask: np.ndarray, length: int, seed: tuple[int, int] | None) -> None:
        """`mask` chooses the documents; without a seed their order is that of the corpus."""
        self._tokens, self._length, self._seed = corpus.tokens, length, seed
        self._starts = corpus.offsets[:-1][mask]
        self._lengths = np.diff(corpus.offsets)[mask]
        num_tokens = int(self._lengths.sum())
        self.size = Size(len(self._lengths), num_tokens, int(corpus.num_bytes[mask].sum()))
        self.num_sequences = count_sequences(num_tokens, length)
        self._epoch = lru_cache(2)(self._shuffle)

    def sequence(self, place: int, epoch: int, pad: int) -> Sequence:
        layout, order = self._epoch(epoch)
        return cut(self._tokens, layout, place if order is None else int(order[place]), self._length, pad)

    def _shuffle(self, epoch: int) -> tuple[Layout, np.ndarray | None]:
        if self._seed is None:
            return lay_out(self._starts, self._lengths), None
        order = shuffled(len(self._starts), *self._seed, epoch, 0)
        return lay_out(self._starts, self._lengths, order), shuffled(self.num_sequences, *self._seed, epoch, 1)


def _held_out(corpus: Corpus, fraction: float) -> np.ndarray:
    """(D,) bool; none where that would leave nothing to train on."""
    held = corpus.hashes < np.uint64(threshold(fraction))
    return held & (not held.all())


def _total(sizes: Iterator[Size]) -> Size:
    return Size(*(sum(column) for column in zip(*sizes, strict=True)))


def prepare(config: DataConfig, report: Report = lambda line: None) -> Dataset:
    """Opens a config's data, after making what the cache does not have.

    Call it before ranks start, and then on each rank, which finds everything made. Several processes may call it at
    once: one works, the others wait.

    Args:
        report: gets one line for each thing that takes time.

    Raises:
        ValueError: if a source or the tokenizer cannot be read; the message names the config key.
        OSError: if the cache cannot be written.
    """
    cache = cache_folder(config.cache, report)
    listings = [find(source, f"data.sources[{number}]") for number, source in enumerate(config.sources)]

    def learn(folder: Path) -> dict[str, Any]:
        report(f"learning the tokenizer {config.tokenizer} from the training documents")
        share = LEARNT_BYTES // len(listings)
        texts = (text for listing in listings for text in sample(listing, config.held_out, share))
        train_bpe(texts, int(config.tokenizer[4:])).save(folder)
        return {"tokenizer": config.tokenizer}

    if config.tokenizer.startswith("bpe:"):
        stamps = [listing.stamp for listing in listings]
        folder = cache / "tokenizers" / digest(VERSION, config.tokenizer, config.held_out, stamps)
        open_or_build(folder, learn, report)
        tokenizer = load_tokenizer(folder)
    else:
        tokenizer = byte_tokenizer() if config.tokenizer == "bytes" else load_tokenizer(config.tokenizer)
    corpora = []
    for listing in listings:
        folder = cache / "corpora" / digest(VERSION, listing.stamp, tokenizer.hash)
        manifest = open_or_build(folder, partial(tokenise, listing, tokenizer, report=report), report)
        corpora.append(open_corpus(folder, manifest))
    return Dataset(config, tokenizer, corpora)


def micro_batches(
    dataset: Dataset, cursor: int, batch_size: int, num_micro_batches: int, data_rank: int, num_data_ranks: int
) -> list[Batch]:
    """One rank's part of the global batch, which is sequences `cursor` to `cursor + batch_size - 1`.

    Each sequence is in one micro-batch of one rank, and the number of sequences in them differs by at most one. A
    micro-batch without any is (1, 1) with no label, so that every rank takes part in every one.
    """
    shares = assign(batch_size, num_micro_batches, data_rank, num_data_ranks)
    return [_stack([dataset.sequence(cursor + i) for i in share], dataset) for share in shares]


def held_out_batches(
    dataset: Dataset, limit: int | None, batch_size: int, data_rank: int, num_data_ranks: int
) -> Iterator[Batch]:
    """One rank's part of the first `limit` held-out sequences, or of all.

    Each is on one rank, in batches of at most `batch_size`; every rank gets equally many batches, some perhaps without
    a label. Without a held-out split there are none.
    """
    count = dataset.num_held_out if limit is None else min(limit, dataset.num_held_out)
    for share in assign(count, -(-count // (batch_size * num_data_ranks)), data_rank, num_data_ranks) if count else []:
        yield _stack([dataset.held_out_sequence(i) for i in share], dataset)


def _stack(sequences: list[Sequence], dataset: Dataset) -> Batch:
    columns = zip(*(sequences or [placeholder(dataset.tokenizer.end_of_document)]), strict=True)
    return Batch(*(np.stack(column) for column in columns))
