"""The tiles of an attention call, planned on the host: which runs each block of rows meets, and what of them it sees.

The kernels compute the same ranges from the same closed forms; here they serve the order of work and the traffic meter.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from armillary.kernels.attention.mask import Mask
from armillary.kernels.attention.places import DOCUMENT, LENGTH, POSITION, ROW, START, STEP, Places


@dataclass(frozen=True)
class Tile:
    """One attention call: which tokens ask, which answer, and by which rule."""

    queries: Places
    keys: Places
    mask: Mask
    scale: float
    """What scores are multiplied with before the softmax."""
    first_head: int = 0
    """Number of the call's first key head in the whole model: what `Mask.shift` counts from."""


BLOCK_COLUMNS = ("row", "start", "count", "position", "step", "first run", "last run", "unused")
"""Columns of a table of blocks, int32: rows of the grid `start .. start + count` of row `row` stand at `position`,
`position + step` and so on, and meet the runs `first run .. last run` of the other side."""


def run_order(places: Places) -> np.ndarray:
    """The order of runs in which those of one row and document are neighbours."""
    runs = places.runs
    return np.lexsort((runs[:, POSITION], runs[:, DOCUMENT], runs[:, ROW]))


def run_table(places: Places) -> np.ndarray:
    """Start, length, first position and step of each run, in `run_order`: int32 (num_runs, 4)."""
    return places.runs[run_order(places)][:, [START, LENGTH, POSITION, STEP]].astype(np.int32, order="C")


def block_table(ours: Places, theirs: Places, size: int) -> np.ndarray:
    """The blocks of at most `size` tokens of `ours`, and the runs of `theirs` of the same row and document: int32."""
    runs = ours.runs
    blocks = -(-runs[:, LENGTH] // size)
    run = np.repeat(np.arange(len(runs)), blocks)
    within = np.arange(len(run)) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    table = np.zeros((len(run), len(BLOCK_COLUMNS)), dtype=np.int64)
    table[:, 0] = runs[run, ROW]
    table[:, 1] = runs[run, START] + within * size
    table[:, 2] = np.minimum(size, runs[run, LENGTH] - within * size)
    table[:, 3] = runs[run, POSITION] + within * size * runs[run, STEP]
    table[:, 4] = runs[run, STEP]
    others = theirs.runs[run_order(theirs)]
    # Row and document as one number, the documents renumbered so that it stays small.
    names = np.unique(np.concatenate([runs[:, DOCUMENT], others[:, DOCUMENT]]))
    wanted = runs[run, ROW] * len(names) + np.searchsorted(names, runs[run, DOCUMENT])
    present = others[:, ROW] * len(names) + np.searchsorted(names, others[:, DOCUMENT])
    table[:, 5] = np.searchsorted(present, wanted, side="left")
    table[:, 6] = np.searchsorted(present, wanted, side="right")
    return table.astype(np.int32)


@dataclass(frozen=True)
class Ranges:
    """What each pair of a block and a run of the other side has in common; arrays (num_pairs,), tokens of the run.

    `begin <= full_begin`, `full_end <= end`: tokens begin .. end are near enough to be seen by some row of the block,
    tokens full_begin .. full_end (if not empty) by every row. Apart from them, `far` tokens are seen that are sinks or
    in strided blocks: before begin where queries look for keys, after end where keys look for queries.
    """

    block: np.ndarray
    run: np.ndarray
    begin: np.ndarray
    full_begin: np.ndarray
    full_end: np.ndarray
    end: np.ndarray
    far: np.ndarray


def key_ranges(mask: Mask, blocks: np.ndarray, runs: np.ndarray, head: int = 0) -> Ranges:
    """What blocks of queries see of runs of keys, for key head `head`."""
    block, run, low, high, position, step, length = _pairs(blocks, runs)

    def index(bound: np.ndarray) -> np.ndarray:
        return np.clip(-((position - bound) // step), 0, length)

    begin = full_begin = np.zeros_like(length)
    end = full_end = length
    if mask.causal:
        full_end, end = index(low + 1), index(high + 1)
    elif mask.window:
        full_end, end = (index((edge // mask.block + mask.reach) * mask.block) for edge in (low, high))
    if mask.window:
        begin, full_begin = (index((edge // mask.block - mask.reach + 1) * mask.block) for edge in (low, high))
    far = np.minimum(index(np.zeros_like(low) + mask.sinks), begin)
    if mask.stride:
        far = far + _strided_before(mask, begin * step + position, position, step, length, begin, head)
    return Ranges(block, run, begin, full_begin, full_end, end, far)


def query_ranges(mask: Mask, blocks: np.ndarray, runs: np.ndarray, head: int = 0) -> Ranges:
    """What of runs of queries sees blocks of keys, for key head `head`."""
    block, run, low, high, position, step, length = _pairs(blocks, runs)

    def index(bound: np.ndarray) -> np.ndarray:
        return np.clip(-((position - bound) // step), 0, length)

    begin = full_begin = np.zeros_like(length)
    end = full_end = length
    if mask.causal:
        begin, full_begin = index(low), index(high)
    elif mask.window:
        begin, full_begin = (index((edge // mask.block - mask.reach + 1) * mask.block) for edge in (low, high))
    if mask.window:
        full_end, end = (index((edge // mask.block + mask.reach) * mask.block) for edge in (low, high))
    always = low < mask.sinks
    if mask.stride:
        first = low // mask.block
        first = first + (-(first + mask.shift * head)) % mask.stride
        always = always | (first <= high // mask.block)
    return Ranges(block, run, begin, full_begin, full_end, end, np.where(always, length - end, 0))


def _pairs(blocks: np.ndarray, runs: np.ndarray) -> tuple[np.ndarray, ...]:
    """Block and run of every pair that may meet; first and last position of the block; position, step and length of
    the run."""
    blocks, runs = blocks.astype(np.int64), runs.astype(np.int64)
    count = blocks[:, 6] - blocks[:, 5]
    block = np.repeat(np.arange(len(blocks)), count)
    run = np.arange(len(block)) - np.repeat(np.cumsum(count) - count, count) + blocks[block, 5]
    low = blocks[block, 3]
    high = low + (blocks[block, 2] - 1) * blocks[block, 4]
    return block, run, low, high, runs[run, 2], runs[run, 3], runs[run, 1]


def _strided_before(mask: Mask, *pair: np.ndarray | int) -> np.ndarray:
    """Tokens of each run that stand in strided blocks after the sinks and before token `begin`."""
    edge, position, step, length, begin, head = pair
    blocks_begun = -(-np.asarray(edge) // mask.block)
    total = np.zeros_like(length)
    for number in range(mask.sinks // mask.block, int(np.max(blocks_begun, initial=0))):
        if (number + mask.shift * head) % mask.stride == 0:
            start, stop = (-((position - bound) // step) for bound in (number * mask.block, (number + 1) * mask.block))
            total = total + np.maximum(np.minimum(stop, begin) - np.clip(start, 0, None), 0)
    return total


def work_order(blocks: np.ndarray, ranges: Ranges) -> np.ndarray:
    """The order of blocks in which those that take longest come first, so that none is left for the end."""
    work = np.bincount(ranges.block, ranges.end - np.minimum(ranges.begin, ranges.end) + ranges.far, len(blocks))
    return np.argsort(-work, kind="stable")


@dataclass(frozen=True)
class DeviceTables:
    """A table of blocks and one of the other side's runs, on the device of the kernels: int32."""

    blocks: Tensor
    runs: Tensor


def query_tables(tile: Tile, size: int, device: torch.device) -> DeviceTables:
    """Blocks of at most `size` queries and all runs of keys."""
    return _tables(tile, size, device, by_queries=True)


def key_tables(tile: Tile, size: int, device: torch.device) -> DeviceTables:
    """Blocks of at most `size` keys and all runs of queries."""
    return _tables(tile, size, device, by_queries=False)


def _tables(tile: Tile, size: int, device: torch.device, by_queries: bool) -> DeviceTables:
    ours, theirs = (tile.queries, tile.keys) if by_queries else (tile.keys, tile.queries)

    def make() -> DeviceTables:
        blocks, runs = block_table(ours, theirs, size), run_table(theirs)
        ranges = (key_ranges if by_queries else query_ranges)(tile.mask, blocks, runs, tile.first_head)
        blocks = np.ascontiguousarray(blocks[work_order(blocks, ranges)])
        on_host = [torch.from_numpy(table) for table in (blocks, runs)]
        if device.type == "cuda":
            on_host = [table.pin_memory().to(device, non_blocking=True) for table in on_host]
        return DeviceTables(*on_host)

    return ours.derived(("tables", by_queries, theirs.key, tile.mask, tile.first_head, size, device), make)
