"""Time on a GPU: medians of events around calls that take turns; on a CPU, for a dry run, of the host's clock."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Turn = Callable[[], Any]
FLUSHED = 256 << 20
"""Bytes written before each call: more than any L2 cache holds."""
WARM = 8192
"""Rows and columns of the matrix that is multiplied with itself to warm up."""
CYCLES_A_SECOND = 2e9
"""Of a GPU, or more: the wait that hides the host is counted in cycles."""
MOST_SECONDS = 1.5
"""Of the repetitions of one set of turns."""


@dataclass(frozen=True)
class Setting:
    """How a section is run."""

    dry: bool
    """On the CPU with tiny sizes: every path, no measurement."""
    repetitions: int = 20
    prepare: bool = False
    """Everything runs once, so that it is compiled; nothing is timed."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def narrow(self) -> torch.dtype:
        """bfloat16; Triton's interpreter cannot compute in it."""
        return torch.float16 if self.dry else torch.bfloat16


@dataclass
class Times:
    """Of turns by name."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Medians."""
    host: dict[str, float] = field(default_factory=dict)
    """Seconds until the call returns, the GPU still at work."""
    errors: dict[str, str] = field(default_factory=dict)
    """Of turns that raised: the error's text; they have no time."""
    repetitions: int = 0


def error_text(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"[:500]


def measure(turns: Mapping[str, Turn], setting: Setting) -> Times:
    """Medians of all turns, interleaved. A turn that raises is left out, and its error kept."""
    times = Times()
    for name, turn in turns.items():
        try:
            for _ in range(1 if setting.prepare or setting.dry else 3):
                began = time.perf_counter()
                turn()
                times.host[name] = time.perf_counter() - began
                _wait(setting)
                times.seconds[name] = time.perf_counter() - began
        except Exception as error:  # peers refuse what they cannot do in many ways
            times.errors[name] = error_text(error)
            times.seconds.pop(name, None)
    if setting.prepare or not times.seconds:
        return times
    left = {name: turns[name] for name in times.seconds}
    fitting = int(MOST_SECONDS / max(sum(times.seconds.values()) + 2e-4 * len(left), 1e-6))
    times.repetitions = 1 if setting.dry else max(5, min(setting.repetitions, fitting))
    # What the host did since the last rounds, the clocks have slowed down for.
    warm_up(setting, 0.05)
    all_seconds = _host_rounds(left) if setting.dry else _gpu_rounds(left, times, setting.device)
    times.seconds = {name: statistics.median(taken) for name, taken in all_seconds.items()}
    return times


def _gpu_rounds(turns: Mapping[str, Turn], times: Times, device: torch.device) -> dict[str, list[float]]:
    cache = torch.empty(FLUSHED // 4, dtype=torch.int32, device=device)
    names = list(turns)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(times.repetitions):
        start = repetition % len(names)
        events = {}
        for name in names[start:] + names[:start]:
            cache.zero_()
            torch.cuda._sleep(int(min(1.5 * times.host[name] + 5e-5, 1e-2) * CYCLES_A_SECOND))
            events[name] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[name][0].record()
            turns[name]()
            events[name][1].record()
        torch.cuda.synchronize()
        for name, (before, after) in events.items():
            taken[name].append(before.elapsed_time(after) / 1e3)
    return taken


def _host_rounds(turns: Mapping[str, Turn]) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {}
    for name, turn in turns.items():
        began = time.perf_counter()
        turn()
        taken[name] = [time.perf_counter() - began]
    return taken


def _wait(setting: Setting) -> None:
    if not setting.dry:
        torch.cuda.synchronize()


def warm_up(setting: Setting, seconds: float = 1.0) -> None:
    """Products of matrices until the clocks are up and the chip is warm."""
    if setting.dry or setting.prepare:
        return
    matrix = torch.randn(WARM, WARM, dtype=torch.bfloat16, device=setting.device)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(10):
            matrix @ matrix
        torch.cuda.synchronize()


def copy_bandwidth(setting: Setting) -> float:
    """Bytes a second that a copy of 1 GiB reads and writes together."""
    source = torch.ones((1 << 30 if not setting.dry else 1 << 16) // 4, device=setting.device)
    target = torch.empty_like(source)
    seconds = measure({"copy": lambda: target.copy_(source)}, setting).seconds["copy"]
    return 2 * source.numel() * 4 / seconds
