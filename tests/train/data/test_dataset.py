"""A run's data: the same sequences from any cursor on any ranks, made once, and made again where damaged."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.train.data import dataset as module
from armillary.train.data.config import DataConfig
from armillary.train.data.dataset import Dataset, held_out_batches, micro_batches, prepare
from armillary.train.data.packing import IGNORE
from armillary.train.data.sources import Source


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts(name: str, count: int) -> list[str]:
    return [f"{name} number {i}: " + f"{name * 5} " * (i % 17) for i in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write(folder / "x.jsonl", texts("x", 150))
    write(folder / "y.jsonl", texts("y", 40))
    return folder


def config(folder: Path, **kwargs: Any) -> DataConfig:
    sources = (Source(path=str(folder / "x.jsonl"), weight=0.7), Source(path=str(folder / "y.jsonl"), weight=0.3))
    values: dict[str, Any] = {"sequence_length": 32, "tokenizer": "bytes", "held_out": 0.1, "sources": sources}
    return DataConfig(**values | {"cache": str(folder / "cache")} | kwargs)


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Dataset:
    return prepare(config(folder))


def flat(sequence: Any) -> list[list[int]]:
    return [array.tolist() for array in sequence]


def test_one_pass_holds_every_training_document_once(folder: Path) -> None:
    source = (Source(path=str(folder / "y.jsonl")),)
    dataset = prepare(config(folder, sources=source))
    count = -(-dataset.train_size.tokens // 32)
    passes, cuts = [], []
    for epoch in range(2):
        sequences = [dataset.sequence(epoch * count + i) for i in range(count)]
        pairs = Counter(p for s in sequences for p in zip(s.tokens.tolist(), s.labels.tolist(), strict=True))
        passes.append(pairs)
        cuts.append({tuple(s.tokens.tolist()) for s in sequences})
        assert sum(int((s.labels != IGNORE).sum()) for s in sequences) == (
            dataset.train_size.tokens - dataset.train_size.documents
        )
    assert passes[0] == passes[1]
    # The documents have other neighbours, too.
    assert cuts[0] != cuts[1]
    assert flat(dataset.sequence(0)) != flat(dataset.sequence(count))
    held = [dataset.held_out_sequence(i) for i in range(dataset.num_held_out)]
    assert dataset.held_out_size.documents > 0
    assert dataset.train_size.documents + dataset.held_out_size.documents == 40
    read = bytes(t for s in held for t in s.tokens.tolist() if t < 256)
    assert len(read) == dataset.held_out_size.num_bytes


@given(order=st.permutations(range(0, 900, 30)))
@settings(max_examples=10)
def test_a_sequence_does_not_depend_on_what_was_read_before(dataset: Dataset, folder: Path, order: list[int]) -> None:
    fresh = prepare(config(folder))
    for index in order:
        assert flat(fresh.sequence(index)) == flat(dataset.sequence(index))


def test_sources_keep_their_weights_for_as_long_as_the_run_lasts(dataset: Dataset) -> None:
    starts = {"x": 0, "y": 0}
    for index in range(1000):
        sequence = dataset.sequence(index)
        text = bytes(t for t in sequence.tokens.tolist() if t < 256).decode()
        (name,) = {letter for letter in text if letter in starts}
        starts[name] += 1
        assert abs(starts["x"] - 0.7 * (index + 1)) < 1


@given(cursor=st.integers(0, 500), batch=st.integers(1, 9), micro=st.integers(1, 3), ranks=st.integers(1, 5))
@settings(max_examples=40)
def test_a_global_batch_is_the_same_on_any_number_of_ranks(
    dataset: Dataset, cursor: int, batch: int, micro: int, ranks: int
) -> None:
    found = []
    for rank in range(ranks):
        batches = micro_batches(dataset, cursor, batch, micro, rank, ranks)
        assert len(batches) == micro
        for b in batches:
            assert b.tokens.shape == b.labels.shape == b.positions.shape == b.documents.shape
            if b.tokens.shape == (1, 1):
                assert b.labels.tolist() == [[IGNORE]]
            else:
                rows = zip(b.tokens, b.labels, b.positions, b.documents, strict=True)
                found += [flat(row) for row in rows]
    wanted = [flat(dataset.sequence(i)) for i in range(cursor, cursor + batch)]
    assert sorted(found) == sorted(wanted)


@given(limit=st.none() | st.integers(0, 60), batch=st.integers(1, 5), ranks=st.integers(1, 5))
@settings(max_examples=40)
def test_each_held_out_sequence_is_on_one_rank(dataset: Dataset, limit: int | None, batch: int, ranks: int) -> None:
    batches = [list(held_out_batches(dataset, limit, batch, rank, ranks)) for rank in range(ranks)]
    assert len({len(b) for b in batches}) == 1
    rows = [tokens.tolist() for of_rank in batches for b in of_rank for tokens in b.tokens if b.tokens.shape[1] > 1]
    assert all(len(b.tokens) <= batch for of_rank in batches for b in of_rank)
    count = dataset.num_held_out if limit is None else min(limit, dataset.num_held_out)
    assert sorted(rows) == sorted(dataset.held_out_sequence(i).tokens.tolist() for i in range(count))


def test_the_first_held_out_sequences_come_from_every_source(dataset: Dataset) -> None:
    sequences = [dataset.held_out_sequence(i) for i in range(dataset.num_held_out)]
    read = [bytes(t for t in s.tokens.tolist() if t < 256) for s in sequences]
    half = len(read) // 2
    assert any(b"x" in text for text in read[:half])
    assert any(b"y" in text for text in read[:half])


def test_label_bytes_count_the_text(folder: Path) -> None:
    (folder / "accents.txt").write_text("élan vital, naïveté, 100 €\n" * 30)
    sources = (Source(path=str(folder / "accents.txt")),)
    for tokenizer in ("bytes", "bpe:300"):
        dataset = prepare(config(folder, sources=sources, tokenizer=tokenizer, sequence_length=50))
        count = -(-dataset.train_size.tokens // 50)
        labels = [dataset.sequence(i).labels for i in range(count)]
        first = {"bytes": 1, "bpe:300": dataset.tokenizer.byte_lengths[dataset.tokenizer.encode("élan vital")[0]]}
        # Everything but the document's first token is a label of some token.
        assert sum(map(dataset.label_bytes, labels)) == dataset.train_size.num_bytes - first[tokenizer]
        assert dataset.label_bytes(np.stack(labels)) == sum(map(dataset.label_bytes, labels))


def test_held_out_documents_stay_so_when_others_are_added_or_moved(folder: Path, tmp_path: Path) -> None:
    def held_out(path: Path) -> set[bytes]:
        d = prepare(config(tmp_path, sources=(Source(path=str(path)),), sequence_length=9000))
        assert d.num_held_out == 1
        tokens = [t for i in range(d.num_held_out) for t in d.held_out_sequence(i).tokens.tolist()]
        joined = b"".join(bytes([t]) if t < 256 else b"\0" for t in tokens)
        return {text for text in joined.split(b"\0") if text}

    few = texts("x", 150)
    before = held_out(write(tmp_path / "few.jsonl", few))
    after = held_out(write(tmp_path / "many.jsonl", texts("new", 100) + few[::-1]))
    assert 2 < len(before) < len(after)
    assert before <= after


def test_a_single_document_is_for_training(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one document")
    one = config(tmp_path, sources=(Source(path=str(tmp_path / "a.txt")),), held_out=0.999999)
    dataset = prepare(one)
    assert (dataset.train_size.documents, dataset.num_held_out) == (1, 0)
    assert list(held_out_batches(dataset, None, 4, 0, 2)) == []
    assert prepare(config(tmp_path, sources=one.sources, tokenizer="bpe:257", held_out=0.999999)).num_held_out == 0


def test_the_fingerprint_is_that_of_the_sequences(folder: Path, tmp_path: Path, dataset: Dataset) -> None:
    for name in ("x", "y"):  # another place, other times, another cache: the same data
        (tmp_path / f"{name}.jsonl").write_bytes((folder / f"{name}.jsonl").read_bytes())
    assert prepare(config(tmp_path)).fingerprint == dataset.fingerprint
    assert prepare(config(folder, batch_size=3)).fingerprint == dataset.fingerprint
    weights = tuple(Source(path=str(folder / f"{name}.jsonl"), weight=1.0) for name in ("x", "y"))
    others: list[dict[str, Any]] = [{"seed": 1}, {"sequence_length": 33}, {"held_out": 0.2}, {"sources": weights}]
    others += [{"sources": weights[::-1]}, {"tokenizer": "bpe:300"}]
    assert len({dataset.fingerprint, *(prepare(config(folder, **kw)).fingerprint for kw in others)}) == 7


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records each time that something is tokenised or learnt."""
    made: list[str] = []
    for name in ("tokenise", "train_bpe"):
        real = getattr(module, name)

        def record(*args: Any, real: Any = real, name: str = name, **kwargs: Any) -> Any:
            made.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, record)
    return made


def test_everything_is_made_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = counted(monkeypatch)
    lines: list[str] = []
    first = prepare(config(folder, cache=str(tmp_path), tokenizer="bpe:300"), lines.append)
    assert made == ["train_bpe", "tokenise", "tokenise"]
    assert len(lines) == 3
    again = prepare(config(folder, cache=str(tmp_path), tokenizer="bpe:300", seed=5, sequence_length=9), lines.append)
    assert len(made) == len(lines) == 3
    assert again.tokenizer.hash == first.tokenizer.hash
    os.utime(folder / "y.jsonl", (1, 1))
    prepare(config(folder, cache=str(tmp_path)))
    assert made[3:] == ["tokenise", "tokenise"]
    prepare(config(folder, cache=str(tmp_path)))
    assert len(made) == 5
    os.utime(folder / "y.jsonl", (2, 2))
    prepare(config(folder, cache=str(tmp_path)))
    assert made[5:] == ["tokenise"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "cut short": lambda path: os.truncate(path, 150),
    "one bit": flip,
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["tokens.npy", "hashes.npy", "manifest.json", "tokenizer.json"])
def test_a_damaged_cache_is_made_again(folder: Path, tmp_path: Path, name: str, damage: str) -> None:
    cfg = config(folder, cache=str(tmp_path), tokenizer="bpe:300")
    good = prepare(cfg)
    wanted = flat(good.sequence(3))
    for path in tmp_path.glob(f"*/*/{name}"):
        if name == "manifest.json" and damage == "one bit":
            path.write_text(path.read_text().replace('"size": ', '"size": 1'))
        else:
            DAMAGE[damage](path)
    lines: list[str] = []
    again = prepare(cfg, lines.append)
    assert any(" is damaged (" in line and line.endswith("; it is made again") for line in lines)
    assert again.fingerprint == good.fingerprint
    assert flat(again.sequence(3)) == wanted


@pytest.mark.parametrize("tokenizer", ["bpe:256", "bpe:", "bpe:1e3", "bpe:-300", "bpe:" + "9" * 5000])
def test_a_vocabulary_too_small_is_refused(tokenizer: str) -> None:
    assert dict(DataConfig(tokenizer=tokenizer).problems()) == {
        "tokenizer": f'is "{tokenizer}"; bpe: takes a vocabulary of 257 (the bytes and the end of a document) to '
        '9999999, such as "bpe:4096"'
    }


def test_other_problems_of_the_config() -> None:
    assert dict(DataConfig(sources=(), tokenizer="").problems()) == {
        "sources": 'is empty; give at least one, such as [{path = "stdlib"}]',
        "tokenizer": 'is empty; give "bpe:4096", "bytes" or the path of a tokenizer.json',
    }
    assert not dict(DataConfig().problems())


def test_a_second_source_is_named_by_its_number(folder: Path) -> None:
    sources = (Source(path=str(folder / "x.jsonl")), Source(path="gone"))
    with pytest.raises(ValueError, match=r'^data\.sources\[1\]\.path = "gone": there is no such file or folder'):
        prepare(config(folder, sources=sources))


def test_imports_are_light() -> None:
    program = (
        "import sys, armillary.train.data.dataset\n"
        "print([m for m in ('torch', 'datasets', 'tokenizers', 'pydantic', 'pyarrow', 'filelock') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.slow
def test_the_standard_library_is_ready_in_seconds(tmp_path: Path) -> None:
    cfg = DataConfig(cache=str(tmp_path))
    began = time.process_time()
    first = prepare(cfg)
    made = time.process_time()
    again = prepare(cfg)
    opened = time.process_time()
    assert first.fingerprint == again.fingerprint
    assert first.vocab_size == 4096
    assert first.num_held_out > 0
    assert first.train_size.num_bytes / first.train_size.tokens > 3
    assert made - began < 60
    assert opened - made < 5
