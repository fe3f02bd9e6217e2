"""Masks and places for property tests, and the mask's rule in plain Python."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from armillary.kernels.attention.mask import Mask


def sees(mask: Mask, i: int, j: int, head: int = 0) -> bool:
    """Whether the query at position i sees the key at position j of its document, in the words of `Mask`."""
    if mask.causal and j > i:
        return False
    if mask.window == 0:
        return True
    near = abs(i // mask.block - j // mask.block) < mask.window / mask.block
    strided = mask.stride > 0 and (j // mask.block + mask.shift * head) % mask.stride == 0
    return near or j < mask.sinks or strided


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    """All forms that are allowed, small enough that each part of the rule matters within a few tokens."""
    block = draw(st.sampled_from([1, 1, 2, 3, 4]))
    window = block * draw(st.integers(1, 6))
    kind = draw(st.sampled_from(["causal", "causal", "full", "window", "band", "sinks", "strided", "strided"]))
    if kind in ("causal", "full"):
        return Mask(causal=kind == "causal")
    if kind in ("window", "band"):
        return Mask(causal=kind == "window", window=window, block=block)
    sinks = block * draw(st.integers(0, 3))
    if kind == "sinks":
        return Mask(window=window, block=block, sinks=sinks)
    stride, shift = draw(st.integers(1, 5)), draw(st.integers(0, 3))
    return Mask(window=window, block=block, sinks=sinks, stride=stride, shift=shift)


@st.composite
def row(draw: st.DrawFn, seq: int) -> tuple[list[int], list[int]]:
    """Positions and documents of one row: stretches of any document, step and place, in order or shuffled."""
    positions: list[int] = []
    documents: list[int] = []
    while len(positions) < seq:
        first, step = draw(st.integers(0, 30)), draw(st.sampled_from([1, 1, 1, 2, 3, 0, -1]))
        stretch = [first + i * step for i in range(draw(st.integers(1, 15))) if first + i * step >= 0]
        positions += stretch
        documents += [draw(st.sampled_from([0, 0, 1, -7, 2**40]))] * len(stretch)
    order = draw(st.permutations(range(seq))) if draw(st.integers(0, 3)) == 0 else range(seq)
    return [positions[i] for i in order], [documents[i] for i in order]


@st.composite
def grids(draw: st.DrawFn, batch: int | None = None, longest: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Positions and documents int64 (batch, seq)."""
    batch = draw(st.integers(0, 3)) if batch is None else batch
    seq = draw(st.integers(0, longest))
    rows: list[Any] = [draw(row(seq)) for _ in range(batch)]
    positions, documents = (np.array([one[i] for one in rows], dtype=np.int64).reshape(batch, seq) for i in (0, 1))
    return positions, documents
