"""`metrics.jsonl`, what a run recorded: written so that a kill or a full disk spoils no line, and read again.

A line is a metrics row, `{"step": 12, "time": 1795442017.4, "train/loss": 3.1, ...}`, or an event,
`{"step": 12, "time": ..., "event": "skip", "message": "...", ...}`. It is strict JSON: a number that is not finite is
written as null, with its name in a second key, `"train/loss": null, "train/loss_text": "nan"`; `read_metrics` puts the
two together again. A line counts once its newline is there.

Imports no torch, so that `report` and `watch` start at once.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

Row = dict[str, Any]

FILE = "metrics.jsonl"
REWINDS = ("begin", "resume", "rollback")
"""Events after which later steps are done again."""
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def open_to_append(path: Path) -> FileIO:
    """The file, without the half line that a killed writer left at its end."""
    if path.exists():
        _repair(path)
    # Unbuffered and appending, so that one write is one whole line, in the file at once and from any thread.
    return path.open("ab", buffering=0)


def _repair(path: Path) -> None:
    """Cut off the half line that a killed writer left at the end."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        file.truncate(end)


def append(file: FileIO, row: Row) -> str | None:
    """Appends a line; returns what kept it out. Of a line that a full disk takes only half of, nothing stays."""
    line = _line(row)
    end = os.fstat(file.fileno()).st_size
    try:
        if file.write(line) == len(line):
            return None
        problem = "the disk is full"
    except OSError as error:
        problem = str(error)
    with suppress(OSError):
        os.ftruncate(file.fileno(), end)
    return problem


def _line(row: Row) -> bytes:
    """One line of the file."""
    strict: Row = {}
    for key, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            strict |= {key: None, f"{key}_text": str(value)}
        else:
            strict[key] = plain(value)
    return json.dumps(strict, allow_nan=False).encode() + b"\n"


def plain(value: Any) -> Any:
    """The value as strict JSON holds it: numbers that are not finite as text, secrets hidden, unknown types as text."""
    if isinstance(value, Mapping):
        return {redact(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, bool | int | None) else redact(str(value))


def redact(text: str) -> str:
    """The text without the secrets of this process's environment: values of variables named like `WANDB_API_KEY`."""
    for name, value in os.environ.items():
        if len(value) >= 8 and re.search(r"_(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS)$", name.upper()):
            text = text.replace(value, f"[{name} hidden]")
    return text


def read_metrics(path: Path) -> list[Row]:
    """All rows and events of a `metrics.jsonl`, as written. A half last line is ignored.

    A broken line elsewhere becomes an event of kind "unreadable". Raises OSError where the file cannot be read.
    """
    rows: list[Row] = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        row = _parse(line)
        if row is None:
            place = {"step": rows[-1]["step"], "time": rows[-1].get("time")} if rows else {"step": 0}
            row = place | {"event": "unreadable", "message": f"line {number} of {path.name} is no row"}
        rows.append(row)
    return rows


def _parse(line: bytes) -> Row | None:
    """The row on a line; None where the line is no row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    if type(step) is not int or not 0 <= step < 10**15 or not isinstance(row.get("event", ""), str):
        return None
    for key in [key for key in row if row[key] is None and str(row.get(f"{key}_text")) in NOT_FINITE]:
        row[key] = NOT_FINITE[row.pop(f"{key}_text")]
    return row


def latest_per_step(rows: Iterable[Row]) -> list[Row]:
    """The metrics that hold, one row for each step in order: what was written last, key by key.

    An event in `REWINDS` takes back all steps after its `to_step` (its `step` where it has none).
    """
    steps: dict[int, Row] = {}
    for row in rows:
        if row.get("event") in REWINDS:
            kept = row.get("to_step", row["step"])
            steps = {step: held for step, held in steps.items() if not isinstance(kept, int) or step <= kept}
        elif "event" not in row:
            steps[row["step"]] = steps.get(row["step"], {}) | row
    return [steps[step] for step in sorted(steps)]
