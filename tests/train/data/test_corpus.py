"""Corpora: what is written, what is held out, and what a tokenizer learns from."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from armillary.train.data import corpus as module
from armillary.train.data.corpus import open_corpus, pieces, sample, text_hash, threshold, tokenise
from armillary.train.data.documents import documents
from armillary.train.data.sources import Source, find
from armillary.train.data.tokenizer import byte_tokenizer, train_bpe

KEY = "data.sources[0]"


@pytest.mark.parametrize("chunk", [8, 1 << 22])
def test_what_is_written_is_what_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    monkeypatch.setattr(module, "PIECE", chunk)
    texts = ["first\nsecond line\nthird\n", "é", "x" * 50]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (tmp_path / "out").mkdir()
    lines: list[str] = []
    listing = find(Source(path=str(tmp_path / "a.jsonl")), KEY)
    facts = tokenise(listing, byte_tokenizer(), tmp_path / "out", lines.append)
    files = {file.name: {"hash": file.name} for file in (tmp_path / "out").iterdir()}
    made = open_corpus(tmp_path / "out", {"files": files})
    assert made.tokens.dtype == np.uint16
    assert bytes(made.tokens[made.tokens < 256].astype(np.uint8)) == "".join(texts).encode()
    for text, begin, end in zip(texts, made.offsets[:-1], made.offsets[1:], strict=True):
        assert made.tokens[begin:end].tolist() == [*text.encode(), 256]
    assert made.hashes.tolist() == [text_hash(t) for t in texts]
    assert made.num_bytes.tolist() == [len(t.encode()) for t in texts]
    assert (facts["documents"], facts["tokens"]) == (3, len(made.tokens))
    assert lines[-1].startswith(f"{listing.source.path}: 3 documents, 0.0 MB are {len(made.tokens)} tokens, made in ")


def test_a_large_vocabulary_takes_wider_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("ab")
    (tmp_path / "out").mkdir()
    tokenizer = byte_tokenizer()
    tokenizer.vocab_size = 70_000
    tokenizer.end_of_document = 69_999
    tokenise(find(Source(path=str(tmp_path / "a.txt")), KEY), tokenizer, tmp_path / "out", print)
    tokens = np.load(tmp_path / "out" / "tokens.npy", allow_pickle=False)
    assert tokens.dtype == np.uint32
    assert tokens.tolist() == [97, 98, 69_999]


def test_a_corpus_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError) as caught:
        tokenise(find(Source(path=str(tmp_path)), KEY), byte_tokenizer(), tmp_path / "out", print)
    assert str(caught.value) == (
        f'{KEY}.path = "{tmp_path}": the corpus is empty: no file, line or row has any text; '
        "give files with text in them"
    )


BPE = train_bpe([f"def f(x):\n    return x + {i}\n\n\n# a  b\n" for i in range(50)], 300)


@given(text=st.text(alphabet="ab \n\r\t(.é'1", max_size=200), size=st.integers(0, 20))
@example(text="a\n\n  b\n \nc.\n\nd", size=1)
def test_tokens_do_not_change_where_a_large_document_is_cut(text: str, size: int) -> None:
    parts = list(pieces(text, size))
    assert "".join(part for part, _ in parts) == text
    assert [last for _, last in parts] == [False] * (len(parts) - 1) + [True]
    assert [i for part, _ in parts for i in BPE.encode(part)] == BPE.encode(text)


def test_held_out_documents_are_the_asked_fraction() -> None:
    hashes = [text_hash(f"document {i}") for i in range(20_000)]
    assert sum(h < threshold(0.05) for h in hashes) == pytest.approx(1000, rel=0.15)
    assert threshold(0) == 0


def test_a_sample_is_of_training_documents_and_of_its_size(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": f"document {i:05}"}) + "\n" for i in range(2000)))
    listing = find(Source(path=str(file)), KEY)
    everything = sample(listing, 0.1, 1 << 20)
    assert everything == [t for t in documents(listing) if text_hash(t) >= threshold(0.1)]
    part = sample(listing, 0.1, listing.num_bytes // 10)
    assert part == sample(listing, 0.1, listing.num_bytes // 10)
    assert 100 < len(part) < 300
    assert set(part) < set(everything)
    assert max(map(everything.index, part)) > 1500  # from the whole file, not its beginning


def test_a_sample_of_few_large_documents_is_their_beginning(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 2000)
    assert sample(find(Source(path=str(tmp_path)), KEY), 0.01, 100) == [("word " * 25)]
    assert sample(find(Source(path=str(tmp_path)), KEY), 0.999999, 100) == [("word " * 25)]
