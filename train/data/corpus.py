"""A corpus: one source's documents as one array of tokens on disk, with where each starts and its hash.

The hash of a document's text alone decides whether it is held out, and guides which ones a tokenizer learns from.
Imports no torch.
"""

import dataclasses
import hashlib
import re
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from armillary.train.data.cache import Report, digest
from armillary.train.data.documents import documents
from armillary.train.data.sources import Listing
from armillary.train.data.tokenizer import Tokenizer

VERSION = 1
"""Changes when what is cached changes its meaning."""

CHUNK = 1 << 22
"""Characters that are tokenised at once."""
PIECE = 1 << 18
"""Characters of a document above which it is tokenised in pieces, for the sake of memory and of several cores."""

ARRAYS = ("tokens.npy", "offsets.npy", "hashes.npy", "num_bytes.npy")
"""Files of a corpus, in the order of Corpus's fields."""


@dataclass(frozen=True)
class Corpus:
    """A tokenised source; D documents, T tokens. Arrays are memory maps."""

    tokens: np.ndarray
    """(T,) uint16 or uint32; each document's tokens and its end-of-document token."""
    offsets: np.ndarray
    """(D + 1,) int64: where each document starts."""
    hashes: np.ndarray
    """(D,) uint64: hash of each document's text."""
    num_bytes: np.ndarray
    """(D,) int64: UTF-8 bytes of each document's text."""
    digest: str
    """Hash of all the above."""


def text_hash(text: str) -> int:
    """64 bits that depend on a text alone; held-out documents are those below a threshold."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def threshold(fraction: float) -> int:
    """Hashes below this are `fraction` of all."""
    return int(fraction * 2**64)


def sample(listing: Listing, held_out: float, num_bytes: int) -> list[str]:
    """About so many characters of the training documents, for a tokenizer to learn from; always the same ones.

    Documents are chosen by their hash, so evenly over the source. Where too few large ones are left by that, the first
    ones are taken.
    """
    low, top = threshold(held_out), 2**64
    rate = min(1.0, num_bytes / listing.num_bytes) if listing.num_bytes else 1.0
    texts: list[str] = []
    for least, most in ((low, low + int(rate * (top - low))), (low, top), (0, top)):
        room = num_bytes + num_bytes // 4
        for text in documents(listing):
            if least <= text_hash(text) < most:
                texts += [piece for piece, _ in pieces(text[:room], PIECE)]
                room -= len(text)
            if room <= 0:
                break
        if texts:
            break
    return texts


def open_corpus(folder: Path, manifest: dict[str, Any]) -> Corpus:
    """Opens what `tokenise` wrote.

    Args:
        manifest: with `files[name]["hash"]` of every file.
    """
    # As plain arrays, since indexing a memory map makes slow objects of its class.
    arrays = (np.asarray(np.load(folder / name, mmap_mode="r", allow_pickle=False)) for name in ARRAYS)
    tokens, offsets, hashes, num_bytes = arrays
    return Corpus(tokens, offsets, hashes, num_bytes, digest([manifest["files"][name]["hash"] for name in ARRAYS]))


def tokenise(listing: Listing, tokenizer: Tokenizer, folder: Path, report: Report) -> dict[str, Any]:
    """Writes a source's tokens into an empty folder; returns facts about them.

    Raises:
        ValueError: if the source cannot be read or has no text.
    """
    began = said = time.monotonic()
    with open(folder / "tokens.npy", "wb") as file:
        writer = _Writer(file, tokenizer)
        for text in documents(listing):
            writer.add(text)
            if time.monotonic() > said + 10:
                said = time.monotonic()
                report(f"{listing.source.path}: {sum(writer.num_bytes) / 1e6:,.0f} MB tokenised so far")
        writer.finish()
    if not writer.hashes:
        raise ValueError(
            f'{listing.key}.path = "{listing.source.path}": the corpus is empty: no file, line or row has any text; '
            "give files with text in them"
        )
    offsets = np.concatenate([[0], np.cumsum(np.array(writer.lengths, dtype=np.int64))])
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "hashes.npy", np.array(writer.hashes, dtype=np.uint64))
    np.save(folder / "num_bytes.npy", np.array(writer.num_bytes, dtype=np.int64))
    size, tokens = sum(writer.num_bytes), int(offsets[-1])
    report(
        f"{listing.source.path}: {len(writer.hashes):,} documents, {size / 1e6:,.1f} MB are {tokens:,} tokens, "
        f"made in {time.monotonic() - began:.1f} s"
    )
    source = dataclasses.asdict(listing.source)
    return {"source": source, "tokenizer": tokenizer.hash, "documents": len(writer.hashes), "tokens": tokens}


class _Writer:
    """Tokenises documents in chunks of bounded size into an .npy file whose length is known only at the end."""

    def __init__(self, file: Any, tokenizer: Tokenizer) -> None:
        self.file, self.tokenizer = file, tokenizer
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self.lengths, self.hashes, self.num_bytes = array("q"), array("Q"), array("q")
        self._pending: list[str] = []
        self._ends: list[bool] = []
        self._characters = 0
        self._length = 0
        self._header(0)

    def add(self, text: str) -> None:
        self.hashes.append(text_hash(text))
        self.num_bytes.append(len(text.encode()))
        for piece, is_last in pieces(text, PIECE):
            self._pending.append(piece)
            self._ends.append(is_last)
            self._characters += len(piece)
            if self._characters >= CHUNK or len(self._pending) >= 4096:
                self._flush()

    def finish(self) -> None:
        self._flush()
        self.file.seek(0)
        self._header(sum(self.lengths))

    def _flush(self) -> None:
        end = [self.tokenizer.end_of_document]
        for ids, is_last in zip(self.tokenizer.encode_batch(self._pending), self._ends, strict=True):
            ids = ids + end if is_last else ids
            self.file.write(np.array(ids, dtype=self.dtype).tobytes())
            self._length += len(ids)
            if is_last:
                self.lengths.append(self._length)
                self._length = 0
        self._pending, self._ends, self._characters = [], [], 0

    def _header(self, count: int) -> None:
        # The format leaves room in the header for the first dim to grow, so it can be written over.
        description = {"descr": self.dtype.str, "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(self.file, description)


def pieces(text: str, size: int) -> Iterator[tuple[str, bool]]:
    """A text in parts of about `size` characters, each with whether it is the last.

    Cuts stand before a line that starts with no space, where the tokenizers made here never join two tokens. Others
    may, so in documents over `size` they can give a token more.
    """
    begin = 0
    while len(text) - begin > size and (line := re.compile(r"\n(?=\S)").search(text, begin + size)):
        yield text[begin : line.end()], False
        begin = line.end()
    yield text[begin:], True
