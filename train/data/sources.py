"""Sources: where text comes from, and the files there. Imports no torch."""

import dataclasses
import math
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path

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
    found = Path(os.path.expanduser(path))
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
