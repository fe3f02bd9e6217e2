"""What a run records, how often and where: in `metrics.jsonl` always, elsewhere if wanted. Imports no torch."""

import importlib.util
import math
import re
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from armillary.train.observe.metrics_file import FILE, Row, append, open_to_append, read_metrics, redact
from armillary.train.observe.sinks import Ending, Sink, open_tensorboard, open_wandb


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
        self._file = open_to_append(folder / FILE)
        known = next(iter(read_metrics(folder / FILE)), {}).get("run")
        identity = known if isinstance(known, str) and re.fullmatch(r"[0-9a-f]{8}", known) else secrets.token_hex(4)
        self._append({"step": 0, "time": time.time(), "event": "open", "run": identity})
        self._sinks: dict[str, Sink] = {}
        online = config.wandb == "online"
        if online or (config.wandb == "offline" and importlib.util.find_spec("wandb")):
            self._guard(
                "wandb", lambda: self._sinks.update(wandb=open_wandb(folder, config.project, online, identity, facts))
            )
        if config.tensorboard:
            self._open("tensorboard", lambda: open_tensorboard(folder))

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

    def _open(self, name: str, opened: Callable[[], Sink]) -> None:
        self._guard(name, lambda: self._sinks.update({name: opened()}))

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
        problem = append(self._file, row)
        if problem and not self._rows_lost:
            self._rows_lost = True
            self._note(redact(f"{self._file.name}: {problem}; rows are lost until it can be written again"))

    def _warn(self, message: str) -> None:
        self._note(redact(message))
        self._append({"step": self._step, "time": time.time(), "event": "warning", "message": message})
