"""The one line that a run shows of itself while it trains.

On a terminal it stays in place; elsewhere it becomes plain lines at a sane rate, without escape codes.
Imports no torch.
"""

import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from armillary.train.words import duration, quantity

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

WIDTH = 80
NARROWEST = 20
"""Columns that are always used."""


def _loss(value: float) -> str:
    return f"{value:.3f}" if not abs(value) >= 1000 else f"{value:.1e}"


def status_line(
    step: int,
    total_steps: int,
    *,
    loss: float,
    tokens_per_sec: float,
    mfu: float | None = None,
    memory_gib: float | None = None,
    eval_loss: float | None = None,
    remaining: str = "ETA -",
    width: int = WIDTH,
) -> str:
    """The line, of at most `width` characters; where that is not enough, the least important parts are left out.

    `mfu` is a fraction, `memory_gib` in GiB, `remaining` the words about time.
    """
    # Pairs of importance and text: parts with the highest number go first.
    parts = [
        (0, f"step {step}/{total_steps}"),
        (1, f"loss {_loss(loss)}"),
        (4, f"eval {_loss(eval_loss)}" if eval_loss is not None else ""),
        (3, f"{quantity(tokens_per_sec)} tok/s"),
        (5, f"MFU {mfu:.0%}" if mfu is not None else ""),
        (6, f"{memory_gib:.1f} GiB" if memory_gib is not None else ""),
        (2, remaining),
    ]
    kept = [part for part in parts if part[1]]
    while len(line := "  ".join(text for _, text in kept)) > width and len(kept) > 1:
        kept.remove(max(kept))
    return line[:width]


class NullStatus:
    """The status of the ranks that show nothing."""

    def update(
        self, step: int, loss: float, tokens_per_sec: float, mfu: float | None = None, memory_gib: float | None = None
    ) -> None:
        """Show a finished step."""

    def evaluated(self, loss: float) -> None:
        """Show this held-out loss from the next update on."""

    def note(self, text: str) -> None:
        """Print lines above the status line."""

    def close(self) -> None:
        """Leave the last line standing."""


class Status(NullStatus):
    """The status line of rank 0.

    Without a terminal a line is printed for the first step, the last, and between them when ten seconds and a hundredth
    of the steps have passed, or a minute. A stream that can no longer be written to is let be: the run goes on.
    """

    def __init__(
        self, total_steps: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total, self._stream, self._clock = total_steps, stream or sys.stdout, clock
        self._started = clock()
        self._seconds_per_step: deque[float] = deque(maxlen=50)
        self._last: tuple[int, float] | None = None
        self._eval_loss: float | None = None
        self._line = ""
        self._shown: tuple[str, int, float] | None = None
        self._live = _open_live(self._stream)

    def update(
        self, step: int, loss: float, tokens_per_sec: float, mfu: float | None = None, memory_gib: float | None = None
    ) -> None:
        self._line = status_line(
            step,
            self._total,
            loss=loss,
            tokens_per_sec=tokens_per_sec,
            mfu=mfu,
            memory_gib=memory_gib,
            eval_loss=self._eval_loss,
            remaining=self._remaining(step),
            width=max(NARROWEST, self._live.console.width) if self._live else WIDTH,
        )
        if self._due(step):
            self._show(step)

    def evaluated(self, loss: float) -> None:
        self._eval_loss = loss

    def note(self, text: str) -> None:
        # A model's sample may hold any character, and those that steer a terminal must not reach it.
        clean = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
        self._print(clean)

    def close(self) -> None:
        if self._line and (self._shown is None or self._shown[0] != self._line):
            self._show(self._total)
        if self._live:
            with suppress(OSError, ValueError):
                self._live.stop()
            self._live = None

    def _remaining(self, step: int) -> str:
        """Time left, from the median of the latest steps, so that an evaluation or a save does not sway it."""
        now = self._clock()
        if self._last and step > self._last[0]:
            self._seconds_per_step.append((now - self._last[1]) / (step - self._last[0]))
        self._last = (step, now)
        if step >= self._total:
            return f"took {duration(now - self._started)}"
        if not self._seconds_per_step:
            return "ETA -"
        return f"ETA {duration(statistics.median(self._seconds_per_step) * (self._total - step))}"

    def _due(self, step: int) -> bool:
        if self._shown is None or step >= self._total:
            return True
        waited = self._clock() - self._shown[2]
        if self._live:
            return waited >= 0.1
        return waited >= 60 or (waited >= 10 and abs(step - self._shown[1]) >= self._total / 100)

    def _show(self, step: int) -> None:
        self._shown = (self._line, step, self._clock())
        if self._live:
            with suppress(OSError, ValueError):
                self._live.update(_styled(self._line), refresh=True)
        else:
            self._print(self._line)

    def _print(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)
        with suppress(OSError, ValueError):
            if self._live:
                self._live.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
            else:
                print(text, file=self._stream, flush=True)


def _open_live(stream: TextIO) -> "Live | None":
    """rich's live display; None where the stream is no terminal that can go back in a line."""
    if not stream.isatty() or os.environ.get("TERM") in (None, "", "dumb", "unknown"):
        return None
    from rich.console import Console
    from rich.live import Live

    live = Live(console=Console(file=stream), auto_refresh=False)
    live.start()
    # A run that is killed could not bring it back.
    live.console.show_cursor(True)
    return live


def _styled(line: str) -> "Text":
    from rich.text import Text

    text = Text(line, no_wrap=True, overflow="crop")
    text.highlight_words(["step", "loss", "eval", "tok/s", "MFU", "GiB", "ETA", "took"], "dim")
    return text
