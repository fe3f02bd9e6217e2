"""Sources: which files, which documents, and what a user's mistake is answered with."""

import sys
from pathlib import Path
from typing import Any

import pytest

from armillary.train.data import sources as module
from armillary.train.data.documents import documents
from armillary.train.data.sources import Source, find

KEY = "data.sources[0]"


def read(path: Path | str, **kwargs: Any) -> list[str]:
    return list(documents(find(Source(path=str(path), **kwargs), KEY)))


def error(path: Path | str, **kwargs: Any) -> str:
    with pytest.raises(ValueError) as caught:
        read(path, **kwargs)
    return str(caught.value)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


def test_a_text_file_is_a_document(tmp_path: Path) -> None:
    for name, text in {"b.txt": "two\r\n", "a.md": "\ufeffone é", "c.py": " \n", "sub/d.txt": "three"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "picture.png").write_bytes(b"\x89\x00")
    (tmp_path / ".hidden.txt").write_text("no")
    assert read(tmp_path) == ["one é", "two\n", "three"]
    assert read(tmp_path / "b.txt") == ["two\n"]
    assert read(f"{tmp_path}/**/*.txt") == ["two\n", "three"]
    assert read(f"{tmp_path}/[ab].*") == ["one é", "two\n"]


def test_a_json_line_is_a_document(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "2020-01-01", "n": 1}\n\n{"text": null}\r\n{"text": "\\u00e9 \\ud800", "n": {"b": []}}')
    assert read(file) == ["2020-01-01", "é ?"]
    (tmp_path / "b.json").write_text(' [{"body": "one"},\n {"body": "two"}]')
    assert read(tmp_path / "b.json", field="body") == ["one", "two"]
    (tmp_path / "c.json").write_text('{"body": "three"}\n{"body": ""}\n')
    assert read(tmp_path / "c.json", field="body") == ["three"]


def test_a_parquet_row_is_a_document(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", [{"n": i, "body": t} for i, t in enumerate(["one", "", None, "two"])])
    assert read(file, field="body") == ["one", "two"]
    assert error(file) == (
        f'{KEY}: {file}, row 1: no field "text" but "body", "n"; set {KEY}.field to the name of the text'
    )
    file.write_bytes(b"PAR1 not really")
    text = error(file)
    assert text.startswith(f"{KEY}: {file} cannot be read as Parquet (")
    assert text.endswith("; write it again or leave it out")


def test_a_hub_data_set_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"body": "one", "n": 1}, {"body": "two", "n": 2}]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("hub:owner/name:config@v1", field="body", split="test") == ["one", "two"]
    assert asked == [(("owner/name", "config"), {"split": "test", "revision": "v1", "streaming": True})]
    assert error("hub:name").startswith(f'{KEY}.path = "hub:name", row 1: no field "text" but "body", "n"; ')


def test_a_hub_data_set_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert error("hub:owner/name") == (
        f"{KEY}.path = \"hub:owner/name\": the hub did not give it (ConnectionError: Couldn't reach 'owner/name' on "
        "the Hub); check the name and the network, or give a local file, folder or glob"
    )


def test_parquet_without_the_package_that_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert error(tmp_path) == (
        f"{KEY}: {tmp_path / 'a.parquet'}: needs the package `datasets`; pip install datasets, or give .jsonl"
    )


def test_the_standard_library_is_its_own_source_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    skipped = ("site-packages/x.py", "test/y.py", "encodings/c.py", "a/__pycache__/z.py")
    for name in ("b.py", "a/__init__.py", *skipped, "lib.so"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "bad.py").write_bytes(b"# \xe9\n")
    (tmp_path / "empty.py").write_text("")
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path))
    assert read("stdlib") == ["# b.py\n", "# a/__init__.py\n"]


def test_the_running_standard_library_is_large_enough_to_learn_from() -> None:
    listing = find(Source(path="stdlib"), KEY)
    assert listing.num_bytes > 8e6
    assert list(listing.files) == sorted(set(listing.files), key=listing.files.index)
    folders = {part for file in listing.files for part in file.parts[-3:-1]}
    assert not {"site-packages", "test", "tests", "encodings"} & folders


ERRORS = [
    ("gone.txt", None, 'there is no such file or folder; give a path, a glob, "stdlib" or "hub:NAME"'),
    ("*.txt", None, "no file matches; mend the glob, or quote it from the shell"),
    ("a.docx", b"x", "nothing that can be read (.docx); allowed are .c, .cc"),
    (".", None, "nothing that can be read (no files); allowed are .c, .cc"),
]


@pytest.mark.parametrize(("name", "content", "words"), ERRORS)
def test_errors_of_paths(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert error(tmp_path / name).startswith(f'{KEY}.path = "{tmp_path / name}": {words}')


LINE_ERRORS = [
    (b'{"text": "a"}\n\n{oops\n', "line 3: not JSON (Expecting property name enclosed in double quotes: line 1 "),
    (b'{"text": "a"}\n{"body": 1, "id": 2}\n', 'line 2: no field "text" but "body", "id"; set '),
    (b"{}\n", 'line 1: no field "text" but none; set data.sources[0].field to the name of the text'),
    (b'[{"text": "a"}]\n', 'line 1: list, not an object; write one such as {"text": "..."}'),
    (b'{"text": 3}\n', 'line 1: field "text" is int, not text; set data.sources[0].field to the name of the text'),
    (b'{"text": "\xff"}\n', "line 1: not JSON ('utf-8' codec can't decode byte 0xff"),
    (b"[" * 100_000, "line 1: not JSON ("),
]


@pytest.mark.parametrize(("content", "words"), LINE_ERRORS)
def test_errors_of_lines_name_file_and_line(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    assert error(file).startswith(f"{KEY}: {file}, {words}")


@pytest.mark.parametrize("content", [b"text\x00", b"caf\xe9", "wide".encode("utf-16")])
def test_a_binary_file_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    assert error(tmp_path) == (
        f"{KEY}: {file} is not UTF-8 text but binary or of another encoding; convert it or leave it out"
    )


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    file.write_text("x")

    def refuse(self: Path, **kwargs: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    assert error(file) == f"{KEY}: {file} cannot be read (Permission denied); change its rights or leave it out"


def test_problems_of_a_source() -> None:
    assert dict(Source(path="hub:").problems()) == {
        "path": 'is "hub:"; give "stdlib", a file, a folder, a glob or "hub:NAME"'
    }
    assert dict(Source(path="a", weight=float("inf")).problems()) == {"weight": "must be finite; it is inf"}
    assert not dict(Source(path="a").problems())


def test_the_stamp_changes_with_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")

    def stamp(**kwargs: Any) -> str:
        return find(Source(path=str(tmp_path), **kwargs), KEY).stamp

    first = stamp()
    assert stamp() == first
    assert stamp(field="body") != first
    assert stamp(weight=2.0) == first
    (tmp_path / "b.txt").write_text("two")
    assert stamp() != first
