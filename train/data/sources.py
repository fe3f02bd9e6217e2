"""Sources: where text comes from, the files there, and the documents in them. Imports no torch.

Plain text and JSON lines are read here, because an error must name the file and the line; what has a format of its own
(Parquet, the hub) is read by `datasets`.
"""

import dataclasses
import json
import math
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from armillary.train.data.cache import digest

PROSE = (".txt", ".text", ".md", ".rst", ".tex", ".html", ".css", ".sql", ".toml", ".yaml", ".yml", ".ini")
CODE = (".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java", ".js", ".ts", ".sh")
TEXT = frozenset((*PROSE, *CODE))
"""Suffixes of files that are one document each."""
LINES = frozenset((".jsonl", ".ndjson", ".json"))
"""Suffixes of files with one JSON object a line; a .json may also be one list of objects."""
SUFFIXES = TEXT | LINES | {".parquet"}

SKIPPED = frozenset(("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"))
"""Folders that are not the standard library's own source, that only some installations of Python have, or that are no
text to learn from: `encodings` is tables of characters."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where text comes from."""

    __pydantic_config__ = {"extra": "forbid"}

    path: str
    """`stdlib` (the source files of Python's standard library); a file, a folder or a glob of text files (a file is a
    document), .jsonl or .json (a line is a document) and .parquet (a row is a document); or `hub:NAME`,
    `hub:NAME:CONFIG`, `hub:NAME:CONFIG@REVISION` for a data set of the Hugging Face hub."""
    weight: float = dataclasses.field(default=1.0, metadata={"above": 0})
    """Share of the training tokens, relative to the other weights; a small source is repeated to reach its share."""
    field: str = "text"
    """Name of the text in a JSON object, a Parquet row or a hub row."""
    split: str = "train"
    """Split of a hub data set."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """What the fields do not allow: pairs of key and sentence."""
        if not self.path.removeprefix("hub:").strip():
            yield "path", f'is "{self.path}"; give "stdlib", a file, a folder, a glob or "hub:NAME"'
        if not math.isfinite(self.weight):
            yield "weight", f"must be finite; it is {self.weight}"


@dataclass(frozen=True)
class Listing:
    """A source and the files that it was found to have."""

    source: Source
    key: str
    """The config key that errors name, such as `data.sources[0]`."""
    files: tuple[Path, ...]
    num_bytes: int
    """Size of the files; 0 where it is unknown."""
    stamp: str
    """Hash of what must be equal for a cached copy to be up to date: names, sizes and times."""


def find(source: Source, key: str) -> Listing:
    """Finds a source's files, in an order that does not depend on the file system.

    Raises:
        ValueError: if there are none, or none that can be read.
    """
    where = f'{key}.path = "{source.path}"'
    if source.path.startswith("hub:"):
        return Listing(source, key, (), 0, digest("hub", source.path, source.split, source.field))
    if source.path == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = [file for file in _walk(root, SKIPPED) if file.suffix == ".py"]
        if not files:
            raise ValueError(f"{where}: this Python keeps no source files in {root}; give a folder of text files")
        sizes = [file.stat().st_size for file in files]
        names = [str(file.relative_to(root)) for file in files]
        return Listing(source, key, tuple(files), sum(sizes), digest("stdlib", sys.version, names, sizes))
    files = _match(source.path, where)
    stats = [file.stat() for file in files]
    facts = [(str(file.resolve()), stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats, strict=True)]
    return Listing(source, key, tuple(files), sum(s.st_size for s in stats), digest("files", source.field, facts))


def _match(path: str, where: str) -> list[Path]:
    found = Path(path).expanduser()
    if found.is_file():
        files = [found]
    elif found.is_dir():
        files = list(_walk(found))
    elif has_magic(path):
        files = sorted(Path(name) for name in glob(str(found), recursive=True) if os.path.isfile(name))
        if not files:
            raise ValueError(f"{where}: no file matches; mend the glob, or quote it from the shell")
    else:
        raise ValueError(f'{where}: there is no such file or folder; give a path, a glob, "stdlib" or "hub:NAME"')
    known = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not known:
        there = ", ".join(sorted({file.suffix or "no suffix" for file in files})) or "no files"
        raise ValueError(f"{where}: nothing that can be read ({there}); allowed are {', '.join(sorted(SUFFIXES))}")
    return known


def _walk(root: Path, skipped: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Files below a folder, sorted, without hidden ones."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        yield from (file for name in sorted(names) if name[0] != "." and (file := Path(folder, name)).is_file())


def documents(listing: Listing) -> Iterator[str]:
    """The texts of a source in order, without empty ones.

    Raises:
        ValueError: naming the file and line that cannot be read.
    """
    source, key = listing.source, listing.key
    if source.path.startswith("hub:"):
        yield from filter(_has_text, _hub(source, key))
    for file in listing.files:
        where = f"{key}: {file}"
        try:
            if file.suffix.lower() in LINES:
                texts = _json_texts(file, source.field, key)
            elif file.suffix.lower() == ".parquet":
                texts = _parquet(file, source.field, key)
            else:
                texts = _plain(file, where, tolerant=source.path == "stdlib")
            yield from filter(_has_text, texts)
        except OSError as error:
            raise ValueError(f"{where} cannot be read ({error.strerror}); change its rights or leave it out") from error


def _has_text(text: str) -> bool:
    return bool(text) and not text.isspace()


def _plain(file: Path, where: str, tolerant: bool) -> Iterator[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" not in text:
        yield text
    elif not tolerant:
        raise ValueError(f"{where} is not UTF-8 text but binary or of another encoding; convert it or leave it out")


def _json_texts(file: Path, field: str, key: str) -> Iterator[str]:
    where = f"{key}: {file}"
    with open(file, "rb") as stream:
        if file.suffix.lower() == ".json" and stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            stream.seek(0)
            for number, value in enumerate(_json(stream.read(), where), 1):
                yield _text(value, field, f"{where}, item {number}", key)
            return
        stream.seek(0)
        for number, line in enumerate(stream, 1):
            if line.strip():
                place = f"{where}, line {number}"
                yield _text(_json(line, place), field, place, key)


def _json(text: bytes, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{place}: not JSON ({error}); write one object such as {{"text": "..."}} a line') from None


def _text(value: Any, field: str, place: str, key: str) -> str:
    """The text in a row; "" where it is null."""
    if not isinstance(value, dict):
        raise ValueError(f'{place}: {type(value).__name__}, not an object; write one such as {{"{field}": "..."}}')
    if field not in value:
        there = ", ".join(f'"{name}"' for name in sorted(value)) or "none"
        raise ValueError(f'{place}: no field "{field}" but {there}; set {key}.field to the name of the text')
    text = value[field]
    if text is not None and not isinstance(text, str):
        kind = type(text).__name__
        raise ValueError(f'{place}: field "{field}" is {kind}, not text; set {key}.field to the name of the text')
    # A JSON escape can spell half a surrogate pair, which no UTF-8 text can hold.
    return (text or "").encode("utf-8", "replace").decode()


def _parquet(file: Path, field: str, key: str) -> Iterator[str]:
    where = f"{key}: {file}"
    dataset_class = _datasets(where).Dataset

    def rows() -> Iterator[Any]:
        # Not load_dataset, which asks the hub to count the use of its Parquet reader.
        yield from _rows(dataset_class.from_parquet(str(file), streaming=True), field)

    failure = f"{where} cannot be read as Parquet"
    for number, row in enumerate(_explained(rows(), failure, "write it again or leave it out"), 1):
        yield _text(row, field, f"{where}, row {number}", key)


def _hub(source: Source, key: str) -> Iterator[str]:
    where = f'{key}.path = "{source.path}"'
    load = _datasets(where).load_dataset
    spec, _, revision = source.path.removeprefix("hub:").partition("@")
    name, _, config = spec.partition(":")

    def rows() -> Iterator[Any]:
        data = load(name, config or None, split=source.split, revision=revision or None, streaming=True)
        yield from _rows(data, source.field)

    remedy = "check the name and the network, or give a local file, folder or glob"
    for number, row in enumerate(_explained(rows(), f"{where}: the hub did not give it", remedy), 1):
        yield _text(row, source.field, f"{where}, row {number}", key)


def _datasets(where: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{where}: needs the package `datasets`; pip install datasets, or give .jsonl") from None
    return datasets


def _rows(data: Any, field: str) -> Iterator[Any]:
    """Rows of a streamed data set, with the one field if they have it."""
    first = next(iter(data.take(1)), None)
    if first is not None:
        yield from data.select_columns([field]) if field in first else [first]


def _explained(rows: Iterable[Any], failure: str, remedy: str) -> Iterator[Any]:
    """Turns whatever a library raises into one sentence."""
    try:
        yield from rows
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{failure} ({type(error).__name__}: {reason}); {remedy}") from error
