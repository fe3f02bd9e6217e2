"""Contenders that take turns, so that what disturbs one disturbs all."""

import time
from collections.abc import Callable


def interleaved(turns: dict[str, Callable[[], None]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each turn, taken in rounds, each of which starts with another one, after one round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for repetition in range(repetitions + 1):
        start = repetition % len(names)
        for name in names[start:] + names[:start]:
            began = time.perf_counter()
            turns[name]()
            if repetition > 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds
