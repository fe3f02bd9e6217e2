"""What a run records: `metrics.jsonl` always, Weights & Biases and TensorBoard beside it where they are wanted.

A line of `metrics.jsonl` is a metrics row, `{"step": 12, "time": 1795442017.4, "train/loss": 3.1, ...}`, or an event,
`{"step": 12, "time": ..., "event": "skip", "message": "...", ...}`. It is strict JSON: a number that is not finite is
written as null, with its name in a second key, `"train/loss": null, "train/loss_text": "nan"`; `read_metrics` puts the
two together again. A line counts once its newline is there.

Imports no torch, so that `report` and `watch` start at once.
"""

import importlib.util
import json
import math
import os
import re
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

Row = dict[str, Any]
Ending = Literal["finished", "stopped", "failed"]

FILE = "metrics.jsonl"
REWINDS = ("begin", "resume", "rollback")
"""Events after which later steps are done again."""
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """What is recorded of a run, how often, and where besides `metrics.jsonl`."""

    __pydantic_config__ = {"extra": "forbid"}

    every: int = field(default=1, metadata={"min": 1})
    """Steps from one recorded row to the next; the last step is always recorded."""
    evaluate_every: int = field(default=0, metadata={"min": 0})
    """Steps from one evaluation on the held-out text to the next; 0 for before the first and after the last alone."""
    evaluate_sequences: int = field(default=64, metadata={"min": 0})
    """Held-out sequences of one evaluation; 0 for all."""
    wandb: Literal["offline", "online", "off"] = "offline"
    """Weights & Biases, where it is installed: into the run folder (`wandb sync` uploads it), to the server, or not."""
    tensorboard: bool = False
    """Whether TensorBoard's event files are written into the run folder too."""
    project: str = "armillary"
    """Name of the project in Weights & Biases."""
    sample_prompt: str = ""
    """Text that the model continues when the run has ended, for the terminal and the report; none where empty."""

    def row_due(self, step: int, last: int) -> bool:
        """Whether the metrics of this step are recorded."""
        return step % self.every == 0 or step == last

    def evaluation_due(self, step: int, last: int) -> bool:
        """Whether the model is evaluated after this step; step 0 is before the first."""
        return step in (0, last) or (self.evaluate_every > 0 and step % self.evaluate_every == 0)


def speed(
    tokens: int,
    seconds: float,
    ranks: int,
    *,
    flops_per_token: float = 0,
    peak_flops: float | None = None,
) -> dict[str, float]:
    """The `perf/` metrics of a step in which all ranks together trained on `tokens` tokens in `seconds`.

    `peak_flops` is that of all ranks together, in operations per second; without it there is no `perf/mfu`, which is
    tokens per second times `flops_per_token` over `peak_flops`, a fraction.
    """
    rate = tokens / seconds if seconds > 0 else math.nan
    figures = {
        "perf/tokens_per_sec_per_rank": rate / ranks,
        "perf/tokens_per_sec": rate,
        "perf/step_time": seconds,
    }
    return figures | ({"perf/mfu": rate * flops_per_token / peak_flops} if peak_flops else {})


def redact(text: str) -> str:
    """The text without the secrets of this process's environment: values of variables named like `WANDB_API_KEY`."""
    for name, value in os.environ.items():
        if len(value) >= 8 and re.search(r"_(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS)$", name.upper()):
            text = text.replace(value, f"[{name} hidden]")
    return text


def _plain(value: Any) -> Any:
    """The value as strict JSON holds it: numbers that are not finite as text, secrets hidden, unknown types as text."""
    if isinstance(value, Mapping):
        return {redact(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, bool | int | None) else redact(str(value))


def _line(row: Row) -> bytes:
    """One line of the file."""
    strict: Row = {}
    for key, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            strict |= {key: None, f"{key}_text": str(value)}
        else:
            strict[key] = _plain(value)
    return json.dumps(strict, allow_nan=False).encode() + b"\n"


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


@dataclass(frozen=True)
class Sink:
    """A place beside the JSON lines."""

    log: Callable[[int, Mapping[str, float]], None]
    close: Callable[[Ending], None]


def _open_wandb(folder: Path, config: MetricsConfig, identity: str, facts: Mapping[str, Any]) -> Sink:
    import wandb

    # It must neither write over the status line nor ask for a login, and a remote's address may hold a password.
    settings = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True, init_timeout=30)
    wandb.setup(settings=settings)
    run = wandb.init(
        project=config.project,
        name=folder.name,
        id=identity,
        dir=str(folder),
        config=_plain(facts),
        mode="online" if config.wandb == "online" else "offline",
        resume="allow" if config.wandb == "online" else None,
        settings=settings,
    )
    # Its own counter refuses to go back, as a rollback does.
    run.define_metric("*", step_metric="step")

    def close(status: Ending) -> None:
        if status == "stopped":
            run.mark_preempting()
        run.finish(exit_code=0 if status == "finished" else 1)

    return Sink(lambda step, values: run.log({"step": step, **values}), close)


def _open_tensorboard(folder: Path) -> Sink:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Sink(log, lambda status: writer.close())


class NullMeter:
    """The meter of the ranks that record nothing."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the metrics of a step."""

    def event(self, step: int, kind: str, message: str, **facts: Any) -> None:
        """Record what happened at a step."""

    def close(self, status: Ending, message: str = "") -> None:
        """Record how the run ended; nothing can be recorded after it."""


class Meter(NullMeter):
    """The meter of rank 0: appends to `metrics.jsonl` in the run's folder and sends the same rows to the sinks.

    `facts` is the resolved config, for Weights & Biases. A folder that holds metrics already is continued, under the
    same identity. Nothing here stops a run: a sink that fails, or that is asked for and not installed, is left out with
    one note; a full disk loses rows, with one note.
    """

    def __init__(
        self, folder: Path, config: MetricsConfig, facts: Mapping[str, Any], note: Callable[[str], None] | None = None
    ) -> None:
        self._note = note or (lambda text: print(text, file=sys.stderr, flush=True))
        self._step = 0
        self._rows_lost = False
        self._counts: Counter[str] = Counter()
        path = folder / FILE
        if path.exists():
            _repair(path)
        # Unbuffered and appending, so that one write is one whole line, in the file at once and from any thread.
        self._file = path.open("ab", buffering=0)
        known = next(iter(read_metrics(path)), {}).get("run")
        identity = known if isinstance(known, str) and re.fullmatch(r"[0-9a-f]{8}", known) else secrets.token_hex(4)
        self._append({"step": 0, "time": time.time(), "event": "open", "run": identity})
        self._sinks: dict[str, Sink] = {}
        if config.wandb == "online" or (config.wandb == "offline" and importlib.util.find_spec("wandb")):
            self._guard("wandb", lambda: self._sinks.update(wandb=_open_wandb(folder, config, identity, facts)))
        if config.tensorboard:
            self._guard("tensorboard", lambda: self._sinks.update(tensorboard=_open_tensorboard(folder)))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row; the values are Python numbers."""
        self._step = step
        self._append({"step": step, "time": time.time(), **values})
        self._send(step, values)

    def event(self, step: int, kind: str, message: str, **facts: Any) -> None:
        """Append an event: "begin", "resume" (at the step it resumes from), "rollback" (with `to_step`), "skip", ...

        The sinks get the count of its kind since the meter was opened, as `ft/<kind>`.
        """
        self._append({"step": step, "time": time.time(), "event": kind, "message": message, **facts})
        self._counts[kind] += 1
        self._send(step, {f"ft/{kind}": self._counts[kind]})

    def close(self, status: Ending, message: str = "") -> None:
        """Append how the run ended and close everything."""
        self._append({"step": self._step, "time": time.time(), "event": "close", "status": status, "message": message})
        for name, sink in list(self._sinks.items()):
            self._guard(name, partial(sink.close, status))
        self._file.close()

    def _send(self, step: int, values: Mapping[str, float]) -> None:
        for name, sink in list(self._sinks.items()):
            self._guard(name, partial(sink.log, step, values))

    def _guard(self, name: str, action: Callable[[], None]) -> None:
        """Do something with a sink; where it fails, say so once and leave the sink out from here on."""
        try:
            action()
        except Exception as error:
            self._sinks.pop(name, None)
            missing = isinstance(error, ModuleNotFoundError)
            problem = f"is not installed: pip install {name}" if missing else f"failed: {type(error).__name__}: {error}"
            self._warn(f"metrics.{name}: {name} {problem}. The run goes on with {FILE} alone.")

    def _append(self, row: Row) -> None:
        """Append a line. What a full disk takes only half of is taken back, so that the file stays readable."""
        line = _line(row)
        end = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) == len(line):
                return
            problem = "the disk is full"
        except OSError as error:
            problem = str(error)
        with suppress(OSError):
            os.ftruncate(self._file.fileno(), end)
        if not self._rows_lost:
            self._rows_lost = True
            self._note(redact(f"{self._file.name}: {problem}; rows are lost until it can be written again"))

    def _warn(self, message: str) -> None:
        self._note(redact(message))
        self._append({"step": self._step, "time": time.time(), "event": "warning", "message": message})
