"""The documents of a source. Imports no torch.

Plain text and JSON lines are read here, because an error must name the file and the line; what has a format of its own
(Parquet, the hub) is read by `datasets`.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from armillary.train.data.sources import LINES, Listing, Source


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
