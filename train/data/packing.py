"""Documents laid end to end and cut into sequences, sources mixed by weight, sequences dealt to ranks.

Pure functions of their arguments: which tokens the sequence number n holds does not depend on what was read before, on
how many ranks there are, or on the versions of numpy (only raw bits and sorting are used). Imports no torch.

Shapes: D documents, L tokens in a sequence.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

IGNORE = -100
"""Label of a token that has none."""

MOST_PARTS = 2**14
"""Length that a mixture's period may have."""


class Sequence(NamedTuple):
    """One training sequence; four arrays of (L,)."""

    tokens: np.ndarray
    """int64. After the end of the data: the end-of-document token."""
    labels: np.ndarray
    """int64: the next token of the same document, or IGNORE."""
    positions: np.ndarray
    """int64: 0 at the sequence's start and at each document's start."""
    documents: np.ndarray
    """int32: ordinal of the document in the sequence; padding counts as one more."""


class Layout(NamedTuple):
    """Documents in the order in which they are laid end to end."""

    starts: np.ndarray
    """(D,) int64: where each document starts in the token file."""
    bounds: np.ndarray
    """(D + 1,) int64: where each document starts in this order, then the total."""


def shuffled(count: int, *key: int) -> np.ndarray:
    """(count,) int64: the numbers below `count` in an order that depends on `count` and the key only."""
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(bits, kind="stable")


def lay_out(starts: np.ndarray, lengths: np.ndarray, order: np.ndarray | None = None) -> Layout:
    """Lays documents, given by (D,) starts and lengths in the token file, end to end; in `order` if it is given."""
    if order is not None:
        starts, lengths = starts[order], lengths[order]
    return Layout(starts, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))


def count_sequences(num_tokens: int, length: int) -> int:
    """Sequences that so many tokens fill, the last perhaps in part."""
    return -(-num_tokens // length)


def cut(tokens: np.ndarray, layout: Layout, index: int, length: int, pad: int) -> Sequence:
    """Sequence number `index` of a layout.

    A token's label is the next token of its document even where the sequence ends between them, so over all sequences
    each token comes once, and so does each pair of neighbours in a document.

    Args:
        tokens: the token file, 1-D.
        index: below `count_sequences(layout.bounds[-1], length)`.
        length: L.
        pad: the token that fills up the last sequence.
    """
    starts, bounds = layout
    begin = index * length
    stop = min(begin + length, int(bounds[-1]))
    first = int(np.searchsorted(bounds, begin, side="right")) - 1
    last = int(np.searchsorted(bounds, stop, side="left"))  # one past the last document
    begins = np.maximum(bounds[first:last], begin)
    counts = np.minimum(bounds[first + 1 : last + 1], stop) - begins
    num = stop - begin

    # Padding is laid out as one more document.
    begins_here, counts = np.append(begins - begin, num), np.append(counts, length - num)
    positions = np.arange(length, dtype=np.int64) - np.repeat(begins_here, counts)
    documents = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    where = np.repeat(starts[first:last] + (begins - bounds[first:last]), counts[:-1]) + positions[:num]

    out = np.full(length, pad, dtype=np.int64)
    out[:num] = tokens[where]
    labels = np.full(length, IGNORE, dtype=np.int64)
    labels[: num - 1] = out[1:num]
    labels[begins_here[1:] - 1] = IGNORE
    if bounds[last] > stop:
        labels[num - 1] = tokens[where[-1] + 1]
    return Sequence(out, labels, positions, documents)


def placeholder(pad: int) -> Sequence:
    """A sequence of one token and no label, for a place that must take part in a step but has nothing to do."""
    zero = np.zeros(1, dtype=np.int64)
    return Sequence(zero + pad, zero + IGNORE, zero.copy(), zero.astype(np.int32))


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


def assign(num_sequences: int, num_micro_batches: int, rank: int, num_ranks: int) -> list[range]:
    """The sequences of a global batch that a rank takes, for each of its micro-batches.

    Every sequence goes to one place, a place being a micro-batch of a rank; places are filled with consecutive
    sequences and their counts differ by at most one, and so do those of ranks.
    """
    each, more = divmod(num_sequences, num_micro_batches * num_ranks)
    places = [micro * num_ranks + rank for micro in range(num_micro_batches)]
    return [range(p * each + min(p, more), (p + 1) * each + min(p + 1, more)) for p in places]
