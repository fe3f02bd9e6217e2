"""Where the tokens of one attention call stand, as runs: data of the host, small whatever the length.

A run is a stretch of neighbouring tokens of one row and one document whose positions grow by one step. A row of packed
documents is a run a document; a rank's share of a sequence is a run a chunk; striped tokens are a run with a step.
Any order of tokens is allowed: the worst is a run a token.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

ROW, START, LENGTH, POSITION, STEP, DOCUMENT = range(6)
"""Columns of a table of runs: row of the batch, first token in it, tokens, their first position, the step from one
position to the next (1 or more), and the document, a number that is compared with those of the same row only."""
MOST = 2**30
"""The largest position: kernels count in 32 bits, and look a little further than a position."""


class Places:
    """The runs of a grid of tokens (batch, seq), each token in exactly one run; and what is derived from them, once.

    A plain class, which FSDP hands to a block as it is. Two of the same runs have equal keys.
    """

    def __init__(self, batch: int, seq: int, runs: np.ndarray) -> None:
        """`runs` int64 (num_runs, 6) with the columns above, sorted by row and start."""
        self.batch, self.seq, self.runs = batch, seq, runs
        self._derived: dict[Any, Any] = {}

    @classmethod
    def in_order(cls, batch: int, seq: int, start: int = 0, step: int = 1) -> Self:
        """One document a row, its positions `start`, `start + step` and so on."""
        runs = np.array([(row, 0, seq, start, step, 0) for row in range(batch if seq else 0)], dtype=np.int64)
        return cls(batch, seq, runs.reshape(-1, 6))

    @classmethod
    def of(cls, positions: Any, documents: Any = None) -> Self:
        """The runs of integer `positions` and `documents` (batch, seq), arrays or CPU tensors; None is one document.

        Raises:
            ValueError: if a position is negative or a tensor is on a GPU, where looking at it would wait for the GPU.
        """
        positions = _array(positions)
        documents = np.zeros_like(positions) if documents is None else _array(documents)
        batch, seq = positions.shape
        if documents.shape != (batch, seq):
            raise ValueError(f"places: positions {positions.shape} and documents {documents.shape} differ in shape")
        if positions.size and positions.min() < 0:
            raise ValueError(f"places: positions count from 0, but one is {positions.min()}")
        if positions.size and positions.max() > MOST:
            raise ValueError(f"places: positions are at most {MOST} (they are 32-bit), but one is {positions.max()}")
        tables = [_runs_of_row(row, positions[row], documents[row]) for row in range(batch if seq else 0)]
        return cls(batch, seq, np.concatenate(tables) if tables else np.zeros((0, 6), np.int64))

    @classmethod
    def packed(cls, rows: Sequence[Sequence[int]]) -> Self:
        """Rows of whole documents: the lengths of each row's, one after the other; all rows of the same sum."""
        positions = np.stack([np.concatenate([np.arange(length) for length in lengths]) for lengths in rows])
        return cls.of(positions, np.stack([np.repeat(np.arange(len(lengths)), lengths) for lengths in rows]))

    @classmethod
    def joined(cls, parts: "Sequence[Places]") -> Self:
        """The tokens of all parts, row by row one part after the other; documents keep their numbers.

        Raises:
            ValueError: if the parts differ in the number of rows.
        """
        if len({part.batch for part in parts}) != 1:
            raise ValueError(f"places: parts of {[part.batch for part in parts]} rows cannot be joined row by row")
        tables, start = [], 0
        for part in parts:
            tables.append(part.runs + np.array([0, start, 0, 0, 0, 0]))
            start += part.seq
        runs = np.concatenate(tables)
        return cls(parts[0].batch, start, runs[np.lexsort((runs[:, START], runs[:, ROW]))])

    def picked(self, tokens: np.ndarray) -> "Places":
        """The places of some tokens of each row: `tokens` bool (seq,). Kept, so that all layers share one."""
        if tokens.all():
            return self

        def make() -> Places:
            return Places.of(self.positions()[:, tokens], self.documents()[:, tokens])

        return self.derived(("picked", tokens.tobytes()), make)

    @property
    def key(self) -> tuple[int, int, bytes]:
        """Equal for equal places."""
        return self.derived("key", lambda: (self.batch, self.seq, self.runs.tobytes()))

    def derived(self, name: Any, make: Callable[[], Any]) -> Any:
        """`make()`, kept under `name`: masks, tables of tiles, tensors on a device."""
        if name not in self._derived:
            self._derived[name] = make()
        return self._derived[name]

    @property
    def in_one_piece(self) -> bool:
        """Whether every row is one run with positions 0, 1, 2 and so on."""
        plain = np.array([0, self.seq, 0, 1])
        return len(self.runs) == self.batch and bool((self.runs[:, [START, LENGTH, POSITION, STEP]] == plain).all())

    @property
    def rows_alike(self) -> bool:
        """Whether all rows have the same positions in the same runs, so that tables of the first serve all."""
        per_row, over = divmod(len(self.runs), max(self.batch, 1))
        runs = self.runs[: len(self.runs) - over].reshape(self.batch, per_row, self.runs.shape[1])
        same = (runs[:, :, START:DOCUMENT] == runs[:1, :, START:DOCUMENT]).all()
        return over == 0 and bool(same) and bool((runs[:, :, ROW] == np.arange(self.batch)[:, None]).all())

    def positions(self, device: Any = "cpu") -> Tensor:
        """Position of each token: int64 (batch, seq)."""
        return self._spread("positions", self._positions, device)

    def documents(self, device: Any = "cpu") -> Tensor:
        """Document of each token: int64 (batch, seq)."""
        return self._spread("documents", lambda: np.repeat(self.runs[:, DOCUMENT], self.runs[:, LENGTH]), device)

    def _positions(self) -> np.ndarray:
        index = np.arange(self.batch * self.seq) % max(self.seq, 1)
        start, position, step = (np.repeat(self.runs[:, c], self.runs[:, LENGTH]) for c in (START, POSITION, STEP))
        return position + (index - start) * step

    def _spread(self, name: str, make: Callable[[], np.ndarray], device: Any) -> Tensor:
        device = torch.device(device)

        def build() -> Tensor:
            on_host = torch.from_numpy(np.ascontiguousarray(make())).view(self.batch, self.seq)
            if device.type == "cuda":
                return on_host.pin_memory().to(device, non_blocking=True)
            return on_host

        return self.derived((name, device), build)


def _array(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        if values.device.type != "cpu":
            raise ValueError("places: positions and documents are data of the host; pass CPU tensors or arrays")
        values = values.numpy()
    return np.asarray(values).astype(np.int64)


def _runs_of_row(row: int, positions: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Runs of one row, (num_runs, 6). Greedy from the left, except that a step other than 1 takes three tokens or more:
    else the joint between two pieces would be torn from the second."""
    steps = np.where(documents[1:] == documents[:-1], np.diff(positions), 0)
    # The stretches of equal steps: from which gap on, how many gaps.
    changes = np.flatnonzero(np.diff(steps, prepend=np.nan)) if len(steps) else np.zeros(0, np.int64)
    counts = np.diff(changes, append=len(steps))
    runs = []
    token = 0  # the first token that is in no run yet
    for first_gap, count in zip(changes.tolist(), counts.tolist(), strict=True):
        step, last = int(steps[first_gap]), first_gap + count  # tokens first_gap .. last are `step` apart
        length = last - token + 1
        if step < 1 or (step > 1 and length < 3):
            # No run holds these gaps: their tokens stand alone, but for the last, which the next stretch may take.
            runs += [(token + i, 1, 1) for i in range(length - 1)]
            token = last
        elif length > 1:
            runs.append((token, length, step))
            token = last + 1
    runs += [(i, 1, 1) for i in range(token, len(positions))]
    return np.array([(row, s, n, positions[s], step, documents[s]) for s, n, step in runs], dtype=np.int64)
