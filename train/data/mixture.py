"""Sources mixed by weight: which source each sequence of a run comes from. Pure functions."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

MOST_PARTS = 2**14
"""Length that a mixture's period may have."""


@dataclass(frozen=True)
class Mixture:
    """Which source each sequence of the training order comes from; repeats after `len(sources)` sequences."""

    sources: np.ndarray
    """The source of each sequence of a period."""
    places: np.ndarray
    """How many earlier sequences of the period come from the same source."""
    parts: np.ndarray
    """Sequences that each source has in a period."""

    def place(self, index: int) -> tuple[int, int]:
        """Source of the sequence `index`, and how many earlier sequences came from that source."""
        period, rest = divmod(index, len(self.sources))
        source = int(self.sources[rest])
        return source, period * int(self.parts[source]) + int(self.places[rest])


def whole_parts(weights: Iterable[float]) -> list[int]:
    """The smallest whole numbers in the proportion of the weights, which are taken as the decimals they are written as.

    Their sum is at most MOST_PARTS; proportions that need more are rounded to that many parts, each at least 1.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(part.denominator for part in exact))
    wholes = [int(part * scale) for part in exact]
    wholes = [whole // math.gcd(*wholes) for whole in wholes]
    total = sum(wholes)
    if total <= MOST_PARTS:
        return wholes
    rounded = [max(1, whole * MOST_PARTS // total) for whole in wholes]
    rounded[wholes.index(max(wholes))] += MOST_PARTS - sum(rounded)
    return rounded


def mix(weights: Iterable[float]) -> Mixture:
    """A mixture in which, after any n sequences, each source has had its share of n to within one sequence.

    Source: R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980): of the sources that may come
    without running ahead, take the one that would be late first.
    """
    parts = np.array(whole_parts(weights), dtype=np.int64)
    period, slack = int(parts.sum()), 2 * max(1, len(parts) - 1)
    had = np.zeros_like(parts)
    sources, places = np.empty(period, dtype=np.int64), np.empty(period, dtype=np.int64)
    for n in range(period):
        behind = ((n + 1) * parts - had * period) * slack
        late = ((slack - 1) * period - behind) / parts
        source = int(np.where(behind >= period, late, np.inf).argmin())
        sources[n], places[n] = source, had[source]
        had[source] += 1
    return Mixture(sources, places, parts)
