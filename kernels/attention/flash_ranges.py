"""What the attention kernels share: which tokens of a run a block meets, and which of a tile it sees.

The closed forms of `mask.py`, in the same words as `tiles.py`: indices count the tokens of a run, and every range is
cut into tiles; tiles outside all ranges are neither loaded nor computed. Functions are inlined, so tuples cost nothing:

    run     position of its first token, step from one position to the next, number of tokens
    limits  the window in mask blocks, the sinks in positions, the stride in blocks, the shift of this key head
    rule    what of the mask is known when a kernel is compiled: see `Rule`
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Rule(NamedTuple):
    """The mask's form, of which each gets a kernel of its own."""

    causal: bool
    window: bool
    far: bool
    """Whether keys outside the window may be seen: sinks or strided blocks."""
    strided: bool
    block: int


@triton.jit
def load_block(blocks_ptr, number):
    """Row, first token (both 64 bits), number of tokens, position and step of a block; first and last run it meets."""
    entry = blocks_ptr + number * 8
    row, first = tl.load(entry).to(tl.int64), tl.load(entry + 1).to(tl.int64)
    count, position, step = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
    return row, first, count, position, step, tl.load(entry + 5), tl.load(entry + 6)


@triton.jit
def load_run(runs_ptr, number):
    """First token (64 bits) of a run, and the run."""
    entry = runs_ptr + number * 4
    return tl.load(entry).to(tl.int64), (tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 1))


@triton.jit
def index_of(position, run):
    """The first token of a run that stands at `position` or after it, 0 to its length."""
    first, step, length = run
    # Rounded up without a negative dividend: what lies before the run is 0.
    return tl.minimum(tl.maximum(position - first, 0) + step - 1, length * step) // step


@triton.jit
def window_edges(low, high, run, limits, rule: tl.constexpr):
    """The tokens of a run within the window of some, and of all, of the positions low .. high, before and after."""
    reach = limits[0]
    before = index_of((low // rule.block - reach + 1) * rule.block, run)
    all_before = index_of((high // rule.block - reach + 1) * rule.block, run)
    all_after = index_of((low // rule.block + reach) * rule.block, run)
    after = index_of((high // rule.block + reach) * rule.block, run)
    return before, all_before, all_after, after


@triton.jit
def key_ranges(low, high, run, limits, rule: tl.constexpr):
    """begin, full_begin, full_end, end of a run of keys, for queries at `low` to `high`."""
    zero = run[2] * 0
    begin, full_begin, full_end, end = zero, zero, run[2], run[2]
    if rule.window:
        begin, full_begin, full_end, end = window_edges(low, high, run, limits, rule)
    if rule.causal:
        full_end, end = index_of(low + 1, run), index_of(high + 1, run)
    return begin, full_begin, full_end, end


@triton.jit
def query_ranges(low, high, run, limits, rule: tl.constexpr):
    """begin, full_begin, full_end, end of a run of queries, for keys at `low` to `high`."""
    zero = run[2] * 0
    begin, full_begin, full_end, end = zero, zero, run[2], run[2]
    if rule.window:
        begin, full_begin, full_end, end = window_edges(low, high, run, limits, rule)
    if rule.causal:
        begin, full_begin = index_of(low, run), index_of(high, run)
    return begin, full_begin, full_end, end


@triton.jit
def middle(begin, full_begin, full_end, SIZE: tl.constexpr):
    """The whole tiles between begin and end that every row sees whole; the edges before and after need the mask."""
    first = begin + tl.cdiv(tl.maximum(full_begin - begin, 0), SIZE) * SIZE
    last = first + tl.maximum(full_end - first, 0) // SIZE * SIZE
    return first, last


@triton.jit
def first_strided(position, limits, rule: tl.constexpr):
    """The first strided block that begins at `position`, a multiple of the block, or after it."""
    stride, shift = limits[2], limits[3]
    number = position // rule.block
    return number + (stride - (number + shift) % stride) % stride


@triton.jit
def far_apart(shown, part, high, rule: tl.constexpr):
    """The bounds `shown` in range `part` of `masked_keys`: what lies beyond the two edges is seen by every row."""
    low_shown, high_shown = shown
    if rule.far:
        low_shown, high_shown = tl.where(part > 1, 0, low_shown), tl.where(part > 1, high, high_shown)
    return low_shown, high_shown


@triton.jit
def num_masked_keys(begin, run, limits, rule: tl.constexpr):
    """How many ranges `masked_keys` has for a run."""
    count = run[2] * 0 + 1
    if rule.window:
        count = count + 1
    if rule.far:
        count = count + 1
    if rule.strided:
        # From the end of the sinks or the beginning of the run, whichever is later, up to the window.
        first = first_strided(tl.maximum(limits[1], run[0] // rule.block * rule.block), limits, rule)
        edge = tl.cdiv(run[0] + begin * run[1], rule.block)
        count = count + tl.cdiv(tl.maximum(edge - first, 0), limits[2])
    return count


@triton.jit
def masked_keys(number, begin, first, last, end, run, limits, rule: tl.constexpr):
    """Tokens low .. high of a range that needs the mask: 0 the right edge, 1 the left, 2 sinks, then strided blocks."""
    low, high = last, end
    if rule.window:
        if number == 1:
            low, high = begin, tl.minimum(first, end)
    if rule.far:
        if number == 2:
            low, high = begin * 0, tl.minimum(index_of(limits[1], run), begin)
    if rule.strided:
        if number > 2:
            start = first_strided(tl.maximum(limits[1], run[0] // rule.block * rule.block), limits, rule)
            position = (start + (number - 3) * limits[2]) * rule.block
            low = index_of(position, run)
            high = tl.minimum(index_of(position + rule.block, run), begin)
    return low, high


@triton.jit
def seen_keys(positions, run, limits, rule: tl.constexpr):
    """The keys low .. high of a run within the window of each query, which stand at `positions`."""
    low, high = positions * 0, positions * 0 + run[2]
    if rule.window:
        block = positions // rule.block
        low = index_of((block - limits[0] + 1) * rule.block, run)
        high = index_of((block + limits[0]) * rule.block, run)
    if rule.causal:
        high = index_of(positions + 1, run)
    return low, high


@triton.jit
def seeing_queries(positions, run, limits, rule: tl.constexpr):
    """The queries low .. high of a run that see each key, which stand at `positions`."""
    low, high = positions * 0, positions * 0 + run[2]
    if rule.window:
        block = positions // rule.block
        low = index_of((block - limits[0] + 1) * rule.block, run)
        high = index_of((block + limits[0]) * rule.block, run)
        if rule.far:
            high = tl.where(is_far(positions, limits, rule), run[2], high)
    if rule.causal:
        low = index_of(positions, run)
    return low, high


@triton.jit
def is_far(positions, limits, rule: tl.constexpr):
    """Whether the keys at `positions` are sinks or in strided blocks, and so seen by all later queries."""
    far = positions < limits[1]
    if rule.strided:
        far = far | ((positions // rule.block + limits[3]) % limits[2] == 0)
    return far


@triton.jit
def some_far(low, high, limits, rule: tl.constexpr):
    """Whether `is_far` holds for some position of low .. high."""
    far = low < limits[1]
    if rule.strided:
        far = far | (first_strided(low // rule.block * rule.block, limits, rule) <= high // rule.block)
    return far


@triton.jit
def load_tile(pointers, rows, dims, MASK_ROWS: tl.constexpr, MASK_DIMS: tl.constexpr):
    """A tile; zeros where `rows` or `dims` (broadcastable conditions) do not hold, as far as they may not hold."""
    if MASK_ROWS and MASK_DIMS:
        tile = tl.load(pointers, mask=rows & dims, other=0.0)
    elif MASK_ROWS:
        tile = tl.load(pointers, mask=rows, other=0.0)
    elif MASK_DIMS:
        tile = tl.load(pointers, mask=dims, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile
