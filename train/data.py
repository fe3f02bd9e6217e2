"""Batches of packed sequences from text: tokenised once, cached, mixed by weight, shuffled. Imports no torch.

The sequence number n of a run is a pure function of the config and n. So a run's place in its data is one number, the
cursor, and it goes on exactly where it was, on any number of ranks.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from armillary.train.corpus import (
    VERSION,
    Corpus,
    Report,
    Source,
    digest,
    find,
    open_corpus,
    sample,
    threshold,
    tokenise,
)
from armillary.train.packing import (
    IGNORE,
    Layout,
    Sequence,
    assign,
    count_sequences,
    cut,
    lay_out,
    mix,
    placeholder,
    shuffled,
)
from armillary.train.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

SMALLEST_BPE = 257
"""Bytes and the end of a document."""
LEARNT_BYTES = 8 << 20
"""How much text a tokenizer learns from, in all sources together."""
HASHED_BYTES = 1 << 28
"""Cached files up to this size are checked by their hash when they are opened, larger ones by their size alone."""
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run reads."""

    __pydantic_config__ = {"extra": "forbid"}

    sequence_length: int = field(default=256, metadata={"min": 2})
    """Tokens in a sequence."""
    batch_size: int = field(default=16, metadata={"min": 1})
    """Sequences in a step, on all ranks together."""
    sources: tuple[Source, ...] = (Source(path="stdlib"),)
    """Where the text comes from."""
    tokenizer: str = "bpe:4096"
    """`bpe:4096` (a byte-level encoding of so many entries, learnt from the sources), `bytes`, a tokenizer.json or a
    folder that holds one."""
    held_out: float = field(default=0.02, metadata={"min": 0, "below": 1})
    """Fraction of the documents that is kept from training, for evaluation; chosen by their text."""
    seed: int = field(default=0, metadata={"min": 0})
    """Seed of the order of the documents; it does not change which are held out."""
    cache: str = ""
    """Folder for tokens and tokenizers; `$ARMILLARY_CACHE` or the user's cache folder when left out."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """What the fields do not allow: pairs of key and sentence."""
        if not self.sources:
            yield "sources", 'is empty; give at least one, such as [{path = "stdlib"}]'
        kind, _, size = self.tokenizer.partition(":")
        if kind == "bpe" and not (size.isascii() and size.isdigit() and len(size) < 8 and int(size) >= SMALLEST_BPE):
            what = f"a vocabulary of {SMALLEST_BPE} (the bytes and the end of a document) to 9999999"
            yield "tokenizer", f'is "{self.tokenizer}"; bpe: takes {what}, such as "bpe:4096"'
        elif not self.tokenizer:
            yield "tokenizer", 'is empty; give "bpe:4096", "bytes" or the path of a tokenizer.json'


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
        publish(folder, learn, report)
        tokenizer = load_tokenizer(folder)
    else:
        tokenizer = byte_tokenizer() if config.tokenizer == "bytes" else load_tokenizer(config.tokenizer)
    corpora = []
    for listing in listings:
        folder = cache / "corpora" / digest(VERSION, listing.stamp, tokenizer.hash)
        manifest = publish(folder, partial(tokenise, listing, tokenizer, report=report), report)
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


def cache_folder(setting: str, report: Report) -> Path:
    """`setting`, or else where caches belong on this machine, or else `.cache/armillary` here."""
    if setting:
        return Path(setting).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    usual = Path(os.environ.get("ARMILLARY_CACHE") or Path(base) / "armillary")
    try:
        usual.mkdir(parents=True, exist_ok=True)
        if os.access(usual, os.W_OK):
            return usual
    except OSError:
        pass
    here = Path(".cache/armillary").absolute()
    report(f"{usual} cannot be written; tokens are kept in {here} (ARMILLARY_CACHE or data.cache names another place)")
    return here


def publish(folder: Path, build: Callable[[Path], dict[str, Any]], report: Report) -> dict[str, Any]:
    """The manifest of a finished folder, which is built first if it is missing or damaged.

    Built aside under a lock and renamed, so that it is whole or absent, whoever is killed and however many build at
    once. The manifest is what `build(folder)` returned, with size and hash of every file.

    Raises:
        OSError: if it cannot be written.
    """
    from filelock import FileLock, Timeout

    if not isinstance(found := _check(folder), str):
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock")
        try:
            lock.acquire(timeout=0.1)
        except Timeout:
            report(f"waiting for another process that prepares the same data in {folder.parent}")
            lock.acquire()
        try:
            return _build(folder, build, report)
        finally:
            lock.release()
    except OSError as error:
        raise OSError(
            error.errno,
            f"the data cache {folder.parent} cannot be written ({error.strerror}); make room there, or set data.cache "
            "(or ARMILLARY_CACHE) to another folder",
        ) from error


def _build(folder: Path, build: Callable[[Path], dict[str, Any]], report: Report) -> dict[str, Any]:
    """Under the lock: what was left half-made by a killed process is removed."""
    if folder.exists():
        found = _check(folder)
        if not isinstance(found, str):
            return found
        report(f"{folder} is damaged ({found}); it is made again")
        shutil.rmtree(folder)
    for left in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        aside.mkdir()
        manifest = build(aside)
        files = sorted(aside.iterdir())
        manifest["files"] = {file.name: {"size": file.stat().st_size, "hash": _file_hash(file)} for file in files}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in (*files, aside / MANIFEST, aside):
            _sync(path)
        os.rename(aside, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return manifest


def _check(folder: Path) -> dict[str, Any] | str:
    """The manifest of a folder, or what is wrong with it."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, fact in manifest["files"].items():
            if (folder / name).stat().st_size != fact["size"]:
                return f"{name} has another size"
            if fact["size"] <= HASHED_BYTES and _file_hash(folder / name) != fact["hash"]:
                return f"{name} has another hash"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return manifest


def _file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
