"""Tokenizers: nothing of a text is lost, byte counts are exact, special tokens cannot be spelled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.train.data.tokenizer import END, Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

CODE = [
    f"def f{i}(self, value):\n    if value:\n        return value + {i}  # naïve → ok\n    return None\n"
    for i in range(200)
]
TEXTS = st.one_of(st.text(), st.text(alphabet=" \n\t\rab'é<|end>1_."))


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(CODE, 330)


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest, bpe: Tokenizer) -> Tokenizer:
    return byte_tokenizer() if request.param == "bytes" else bpe


@given(text=TEXTS)
def test_text_comes_back_and_its_bytes_are_counted(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert tokenizer.end_of_document not in ids
    assert tokenizer.encode_batch([text, "x"]) == [ids, tokenizer.encode("x")]


def test_spelling_the_special_token_is_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"a{END}b")
    assert tokenizer.end_of_document not in ids
    assert tokenizer.decode(ids) == f"a{END}b"
    assert tokenizer.byte_lengths[tokenizer.end_of_document] == 0
    assert tokenizer.decode([*ids, tokenizer.end_of_document]) == f"a{END}b"


def test_bytes_are_numbered_by_value() -> None:
    tokenizer = byte_tokenizer()
    text = "aé\n \u2581\U0001f600"
    assert tokenizer.encode(text) == list(text.encode())
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)
    assert tokenizer.byte_lengths.tolist() == [1] * 256 + [0]


def test_bpe_has_the_size_asked_for_and_keeps_indentation_together(bpe: Tokenizer) -> None:
    assert bpe.vocab_size == 330
    assert len(bpe.encode("\n        return")) <= 4
    assert sum(len(ids) for ids in bpe.encode_batch(CODE)) < sum(map(len, CODE)) / 3


def test_bpe_stops_where_nothing_repeats() -> None:
    assert train_bpe(["ab"], 4096).vocab_size == 257


def test_bpe_is_the_same_in_every_process_and_on_any_number_of_cores() -> None:
    program = (
        "from armillary.train.data.tokenizer import train_bpe\n"
        "texts = [f'def f{i}(x):\\n    return x * {i * i}\\n' for i in range(500)]\n"
        "print(train_bpe(iter(texts), 600).hash)"
    )
    hashes = set()
    for threads, seed in (("1", "1"), ("4", "2")):
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        hashes.add(done.stdout)
    assert len(hashes) == 1


def test_saved_and_loaded_it_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "new")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    for path in (tmp_path / "new", tmp_path / "new" / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded.hash == tokenizer.hash
        assert loaded.end_of_document == tokenizer.end_of_document
        assert loaded.encode(CODE[0]) == tokenizer.encode(CODE[0])


def test_hash_tells_tokenizers_apart(bpe: Tokenizer) -> None:
    assert len({bpe.hash, byte_tokenizer().hash, train_bpe(CODE, 331).hash}) == 3


def test_transformers_reads_what_is_saved(bpe: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    bpe.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == bpe.end_of_document
    assert theirs.encode(CODE[3]) == bpe.encode(CODE[3])


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer as Llama 2 has it: a mark for a space, and bytes for letters that are not in the vocabulary."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, normalizers

    words = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", "a", "b", "é", "ab", "\u2581ab"]
    merges = [("a", "b"), ("\u2581", "ab")]
    vocabulary = {word: number for number, word in enumerate(words)}
    inner = Inner(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Replace(" ", "\u2581")
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens(["</s>"])
    inner.enable_truncation(2)
    inner.enable_padding(length=50)
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.json"
    inner.save(str(path))
    return load_tokenizer(path)


@given(text=st.text(alphabet=" abé\n☃x"))
def test_byte_fallback_counts_bytes(sentencepiece: Tokenizer, text: str) -> None:
    ids = sentencepiece.encode(text)
    assert sentencepiece.byte_lengths[ids].sum() == len(text.encode())


def test_truncation_and_padding_of_a_loaded_tokenizer_are_off(sentencepiece: Tokenizer) -> None:
    assert sentencepiece.decode(sentencepiece.encode(" ab ab\n")) == " ab ab\n"
    assert sentencepiece.decode([sentencepiece.end_of_document]) == ""


def test_end_of_document_is_what_the_config_beside_it_says(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    for name in ("a", {"content": "a"}):
        config.write_text(json.dumps({"eos_token": name}))
        assert load_tokenizer(tmp_path).end_of_document == bpe.encode("a")[0]
    config.write_text('{"eos_token": null}')
    assert load_tokenizer(tmp_path).end_of_document == bpe.end_of_document


def _error(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load_tokenizer(path)
    return str(caught.value)


def test_errors_say_what_where_and_what_to_do(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Inner
    from tokenizers import models

    file = tmp_path / "tokenizer.json"
    where = f'data.tokenizer = "{tmp_path}": '
    assert _error(tmp_path) == (
        f'{where}there is no file {file}; give "bpe:4096", "bytes", a tokenizer.json or a folder that holds one'
    )
    file.write_text('{"model": 3}')
    text = _error(tmp_path)
    assert text.startswith(f"{where}{file} is not a tokenizer file (")
    assert text.endswith("; give a tokenizer.json that the library `tokenizers` can read")
    file.write_bytes(b"\xff\x00binary")
    assert f"{file} is not a tokenizer file (" in _error(tmp_path)
    Inner(models.WordLevel({"word": 0}, unk_token="word")).save(str(file))
    text = _error(tmp_path)
    assert text.startswith(f"{where}no token that ends a document (tried <|end|>, ")
    assert text.endswith(f'; put a tokenizer_config.json with "eos_token" beside {file}')
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    assert "tokenizer_config.json is not a JSON object (" in _error(tmp_path)
