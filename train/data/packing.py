"""Documents laid end to end and cut into sequences, and sequences dealt to ranks.

Pure functions of their arguments: which tokens the sequence number n holds does not depend on what was read before, on
how many ranks there are, or on the versions of numpy (only raw bits and sorting are used). Imports no torch.

Shapes: D documents, L tokens in a sequence.
"""

from typing import NamedTuple

import numpy as np

IGNORE = -100
"""Label of a token that has none."""


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


def assign(num_sequences: int, num_micro_batches: int, rank: int, num_ranks: int) -> list[range]:
    """The sequences of a global batch that a rank takes, for each of its micro-batches.

    Every sequence goes to one place, a place being a micro-batch of a rank; places are filled with consecutive
    sequences and their counts differ by at most one, and so do those of ranks.
    """
    each, more = divmod(num_sequences, num_micro_batches * num_ranks)
    places = [micro * num_ranks + rank for micro in range(num_micro_batches)]
    return [range(p * each + min(p, more), (p + 1) * each + min(p + 1, more)) for p in places]
