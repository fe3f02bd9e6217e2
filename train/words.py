"""Spans of time, counts and lists, as a person reads them. The standard library alone."""

from collections.abc import Collection


def duration(seconds: float) -> str:
    """A span of time in at most seven characters: 0:42, 12:03, 3h 07m, 5d 02h."""
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


def quantity(number: float) -> str:
    """A count in few characters: 940, 4,532, 45.3k, 1.23M; digits enough to see it move."""
    if abs(number) < 9999.5:
        return f"{number:,.0f}"
    for power, unit in enumerate("kMGTPE", start=1):
        if abs(number) < 999.5 * 1000**power:
            return f"{number / 1000**power:.3g}{unit}"
    return f"{number:.1e}"


def few(sentences: Collection[str], most: int = 3) -> str:
    """The first few of a list in one line, and how many more there are."""
    more = len(sentences) - most
    return "; ".join(list(sentences)[:most]) + (f" (and {more} more)" if more > 0 else "")
