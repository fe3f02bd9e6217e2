"""How an attention call on the CPU is cut into calls of torch's kernel: planned on the host, once for all layers.

That kernel knows three shapes: all keys seen, a causal square whose first query sees the first key alone, and a mask.
Two ways to cut are priced, and the cheaper is taken:

- by runs: what a run of queries sees of each run of keys is all, or a square, in closed form; only with a window, or
  steps that differ, is it cut into blocks, each with its own range of keys and a mask;
- by blocks of neighbouring queries, whatever they are, each masked over the keys that some of its queries sees: for
  documents of a few tokens and for tokens in no order. The rows of a batch may be taken together.

No mask is larger than a block of queries times the keys, so memory is linear in the length.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from armillary.kernels.attention.mask import Mask, visible
from armillary.kernels.attention.places import DOCUMENT, LENGTH, POSITION, ROW, START, STEP, Places
from armillary.kernels.attention.tiles import Ranges, Tile, block_table, key_ranges, run_table

BLOCK = 128
"""Queries of a masked call."""
LONG = 4 * BLOCK
"""Keys seen by a whole block that are worth a call of their own, without a mask."""
CALL = 7_000
"""What a call costs besides its work, forward and backward, in scores. Measured on one core, a row of 1,024 tokens cut
into 1 to 128 documents: 61 to 76 microseconds a call, 7 to 13 nanoseconds a score of one head (head_dim 32, 64)."""
CAUSAL_SHARE = 0.6
"""What a causal square costs beside a full one: torch's kernel rounds the diagonal up to blocks."""
KEPT = 1024
"""Numbers of mask a query that are kept from one call to the next; a plan with more makes them anew."""


@dataclass
class Part:
    """One call: some queries of the piece against some keys."""

    queries: slice
    keys: slice | Tensor
    """A stretch of the grid, or int64 indices into it."""
    kind: Literal["full", "causal", "masked"]
    kept: Tensor | None = None
    """What `seen` returns, if it is kept."""


@dataclass(frozen=True)
class Piece:
    """Queries whose calls are joined to one result: `queries` of `rows`, for the key heads `heads` and theirs."""

    rows: slice
    heads: slice
    queries: slice
    parts: tuple[Part, ...]
    alike: bool
    """Whether the mask of the first row is that of all."""


def plan(tile: Tile, kv_heads: int) -> list[Piece]:
    """The cheapest pieces found for a call with `kv_heads` key heads; they hold each query and head once."""

    def make() -> list[Piece]:
        pieces = [piece for heads in _head_groups(tile, kv_heads) for piece in _cheapest(tile, heads)]
        masked = [(piece, part) for piece in pieces for part in piece.parts if part.kind == "masked"]
        size = sum((1 if m.alike else _size(m.rows)) * _size(part.queries) * _size(part.keys) for m, part in masked)
        if size <= KEPT * tile.queries.batch * tile.queries.seq:
            for piece, part in masked:
                part.kept = seen(tile, piece, part)
        return pieces

    return tile.queries.derived(("cpu plan", tile.keys.key, tile.mask, tile.first_head, kv_heads), make)


def seen(tile: Tile, piece: Piece, part: Part) -> Tensor:
    """Which keys each query of a part sees: bool (rows or 1, queries, keys)."""
    if part.kept is not None:
        return part.kept
    rows = slice(piece.rows.start, piece.rows.start + 1) if piece.alike else piece.rows
    q_positions, q_documents = (
        tile.queries.positions()[rows, part.queries],
        tile.queries.documents()[rows, part.queries],
    )
    k_positions, k_documents = tile.keys.positions()[rows][:, part.keys], tile.keys.documents()[rows][:, part.keys]
    same = q_documents[:, :, None] == k_documents[:, None, :]
    head = tile.first_head + piece.heads.start
    return same & visible(tile.mask, q_positions[:, :, None], k_positions[:, None, :], head)


def _head_groups(tile: Tile, kv_heads: int) -> Iterator[slice]:
    """Neighbouring key heads that see the same."""
    mask = tile.mask
    start = 0
    for head in range(1, kv_heads + 1):
        if head == kv_heads or (mask.stride and mask.shift * (head - start) % mask.stride):
            yield slice(start, head)
            start = head


def _cheapest(tile: Tile, heads: slice) -> list[Piece]:
    queries, keys = tile.queries, tile.keys
    if queries.batch == 0 or queries.seq == 0:
        return []
    groups = list(_like_rows(queries, keys))
    pieces = [piece for rows in groups for piece in _cheapest_for_rows(tile, rows, heads)]
    # Rows that differ can share masked calls.
    if len(groups) > 1 and _many_calls(pieces, queries.seq):
        together = list(_by_blocks(tile, slice(0, queries.batch), heads, alike=False))
        pieces = min(pieces, together, key=_cost)
    return pieces


def _like_rows(queries: Places, keys: Places) -> Iterator[slice]:
    """Neighbouring rows with the same runs, but for the names of their documents."""
    start, before = 0, b""
    if queries is keys and queries.in_one_piece:
        yield slice(0, queries.batch)
        return
    for row in range(queries.batch + 1):
        now = _structure(queries, keys, row) if row < queries.batch else b""
        if row > start and now != before:
            yield slice(start, row)
            start = row
        before = now


def _structure(queries: Places, keys: Places, row: int) -> bytes:
    tables = [places.runs[places.runs[:, ROW] == row] for places in (queries, keys)]
    _, names = np.unique(np.concatenate([table[:, DOCUMENT] for table in tables]), return_inverse=True)
    runs = np.concatenate([table[:, [START, LENGTH, POSITION, STEP]] for table in tables])
    return np.column_stack([runs, names]).tobytes() + bytes(str(len(tables[0])), "ascii")


def _cheapest_for_rows(tile: Tile, rows: slice, heads: slice) -> list[Piece]:
    queries, keys = (_one_row(places, rows.start) for places in (tile.queries, tile.keys))
    names = np.union1d(queries.runs[:, DOCUMENT], keys.runs[:, DOCUMENT])
    counts = [np.bincount(np.searchsorted(names, p.runs[:, DOCUMENT]), minlength=len(names)) for p in (queries, keys)]
    dense = -(-queries.seq // BLOCK) * CALL + _size(rows) * _size(heads) * queries.seq * keys.seq
    # No more pairs of runs are looked at than are worth a call, all in all.
    if int(counts[0] @ counts[1]) * CALL > 4 * dense:
        return list(_by_blocks(tile, rows, heads, alike=True))
    pieces = list(_by_runs(queries, keys, tile, rows, heads))
    if _many_calls(pieces, queries.seq):
        pieces = min(pieces, list(_by_blocks(tile, rows, heads, alike=True)), key=_cost)
    return pieces


def _one_row(places: Places, row: int) -> Places:
    runs = places.runs[places.runs[:, ROW] == row]
    return Places(1, places.seq, runs * (np.arange(runs.shape[1]) != ROW))


def _cost(pieces: list[Piece]) -> float:
    total = 0.0
    for piece in pieces:
        for part in piece.parts:
            scores = _size(piece.rows) * _size(piece.heads) * _size(part.queries) * _size(part.keys)
            total += CALL + scores * (CAUSAL_SHARE if part.kind == "causal" else 1)
    return total


def _many_calls(pieces: list[Piece], seq: int) -> bool:
    """Whether what a plan by blocks may save in calls is no trifle, so that it is worth a look."""
    saved = sum(len(piece.parts) for piece in pieces) - -(-seq // BLOCK)
    return saved * CALL > 0.05 * _cost(pieces)


def _by_runs(queries: Places, keys: Places, tile: Tile, rows: slice, heads: slice) -> Iterator[Piece]:
    """Pieces of one row's runs, which stand for those of all `rows`."""
    mask, head = tile.mask, tile.first_head + heads.start
    for run in queries.runs:
        others = keys.runs[keys.runs[:, DOCUMENT] == run[DOCUMENT]]
        stretch = slice(int(run[START]), int(run[START] + run[LENGTH]))
        if not mask.window and (not mask.causal or (others[:, STEP] == run[STEP]).all()):
            found = [each for other in others for each in _closed_form(mask, run, other)]
            yield Piece(rows, heads, stretch, _joined(stretch, found), alike=True)
            continue
        one_run = Places(1, queries.seq, run[None])
        blocks, table = block_table(one_run, keys, BLOCK), run_table(keys)
        ranges = key_ranges(mask, blocks, table, head)
        firsts = np.searchsorted(ranges.block, np.arange(len(blocks) + 1))
        for number, block in enumerate(blocks):
            pairs = range(firsts[number], firsts[number + 1])
            stretch = slice(int(block[1]), int(block[1] + block[2]))
            yield Piece(rows, heads, stretch, _parts_of_block(mask, stretch, block, table, ranges, pairs, head), True)


def _closed_form(mask: Mask, queries: np.ndarray, keys: np.ndarray) -> Iterator[tuple[int, int, int, bool]]:
    """What a run of queries sees of a run of keys of the same step, without a window: from which query on, the keys
    from where to where, and whether all of them or a causal square."""
    q_start, q_length, k_start, k_length = (int(run[c]) for run in (queries, keys) for c in (START, LENGTH))
    # Query i sees keys 0 .. i + ahead.
    ahead = int((queries[POSITION] - keys[POSITION]) // queries[STEP]) if mask.causal else k_length
    blind = max(0, -ahead)
    full = min(max(ahead, 0), k_length)
    square = min(k_length - full, q_length - blind)
    if square == 1:
        full, square = full + 1, 0
    if full and blind < q_length:
        yield q_start + blind, k_start, k_start + full, False
    if square > 0:
        yield q_start + blind, k_start + full, k_start + full + square, True


def _joined(queries: slice, found: list[tuple[int, int, int, bool]]) -> tuple[Part, ...]:
    """What `_closed_form` found for a run of queries; what all see of neighbouring keys is one call."""
    joined: list[tuple[int, int, int, bool]] = []
    for first, start, stop, square in sorted(found, key=lambda each: (each[0], each[3], each[1])):
        if joined and not square and joined[-1][0] == first and joined[-1][2:] == (start, False):
            joined[-1] = (first, joined[-1][1], stop, False)
        else:
            joined.append((first, start, stop, square))
    return tuple(
        Part(slice(first, queries.stop), slice(start, stop), "causal" if square else "full")
        for first, start, stop, square in joined
    )


def _parts_of_block(
    mask: Mask, queries: slice, block: np.ndarray, table: np.ndarray, ranges: Ranges, pairs: range, head: int
) -> tuple[Part, ...]:
    """The keys that a block sees of all runs: a long stretch seen by the whole block apart, the others masked."""
    some, whole = [np.zeros(0, np.int64)], slice(0, 0)
    all_seen = True
    for pair in pairs:
        start, _, position, step = (int(number) for number in table[ranges.run[pair]])
        begin, end = int(ranges.begin[pair]), int(ranges.end[pair])
        full = slice(int(ranges.full_begin[pair]), int(ranges.full_end[pair]))
        near = np.arange(begin, max(begin, end))
        some.append(start + near)
        all_seen &= len(near) == 0 or (full.start <= begin and full.stop >= end)
        if _size(full) > _size(whole):
            whole = slice(start + full.start, start + full.stop)
        if ranges.far[pair]:
            before = torch.arange(min(begin, int(table[ranges.run[pair], 1])))
            far = visible(mask, torch.tensor(int(block[3])), position + step * before, head)
            some.append(start + before[far].numpy())
    keys = np.sort(np.concatenate(some))
    if _size(whole) < LONG or all_seen:
        return _part(queries, keys, "full" if all_seen else "masked")
    rest = keys[(keys < whole.start) | (keys >= whole.stop)]
    return Part(queries, whole, "full"), *_part(queries, rest, "masked")


def _part(queries: slice, keys: np.ndarray, kind: Literal["full", "masked"]) -> tuple[Part, ...]:
    if len(keys) == 0:
        return ()
    if keys[-1] - keys[0] == len(keys) - 1:
        return (Part(queries, slice(int(keys[0]), int(keys[-1]) + 1), kind),)
    return (Part(queries, torch.from_numpy(keys), kind),)


def _by_blocks(tile: Tile, rows: slice, heads: slice, alike: bool) -> Iterator[Piece]:
    """Blocks of neighbouring queries over the keys that some of them sees, in any of the rows."""
    for start in range(0, tile.queries.seq, BLOCK):
        stretch = slice(start, min(start + BLOCK, tile.queries.seq))
        wanted, always = torch.zeros(tile.keys.seq, dtype=torch.bool), True
        for row in range(rows.start, rows.start + 1 if alike else rows.stop):
            one = Piece(slice(row, row + 1), heads, stretch, (), alike=True)
            # Where documents are short, few keys are of those of the block.
            same = torch.isin(tile.keys.documents()[row], tile.queries.documents()[row, stretch]).nonzero()[:, 0]
            shown = seen(tile, one, Part(stretch, same, "masked"))[0]
            wanted[same] |= shown.any(0)
            always = always and bool((shown.all(0) == shown.any(0)).all())
        kind: Literal["full", "masked"] = "full" if alike and always else "masked"
        yield Piece(rows, heads, stretch, _part(stretch, wanted.nonzero()[:, 0].numpy(), kind), alike)


def _size(stretch: slice | Tensor) -> int:
    return len(stretch) if isinstance(stretch, Tensor) else max(0, stretch.stop - stretch.start)
