"""What the tests of attention share: any tile, tensors for it, and tiles of which a call is the sum."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import strategies as st
from tile_cases import masks
from torch import Tensor

from armillary.kernels.attention.places import Places
from armillary.kernels.attention.tiles import Tile


@dataclass(frozen=True)
class Case:
    """A tile and the sizes of its tensors."""

    tile: Tile
    heads: int
    kv_heads: int
    head_dim: int
    seed: int

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v; views into larger tensors, whose other channels are NaN."""
        generator = torch.Generator().manual_seed(self.seed)
        tensors = []
        for places, heads in (
            (self.tile.queries, self.heads),
            (self.tile.keys, self.kv_heads),
            (self.tile.keys, self.kv_heads),
        ):
            wide = torch.full((places.batch, places.seq, heads, self.head_dim + 3), math.nan, dtype=dtype)
            view = wide[..., 1 : 1 + self.head_dim]
            view.copy_(torch.randn(view.shape, generator=generator, dtype=torch.float64))
            tensors.append(view)
        return tensors[0], tensors[1], tensors[2]

    def like(self, tensor: Tensor, number: int) -> Tensor:
        """Normal numbers in the shape and dtype of a result."""
        generator = torch.Generator().manual_seed(self.seed + number)
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)


@st.composite
def grids(draw: st.DrawFn, batch: int, longest: int = 40) -> Places:
    """Rows in order from anywhere and in steps; packed documents of any lengths; a document's chunks in any order; runs
    of any documents; tokens in any order."""
    seq = draw(st.sampled_from([0, 1, 2, longest // 3, longest]))
    kind = draw(st.sampled_from(["in order", "packed", "chunks", "pieces", "shuffled"]))
    if kind == "in order":
        return Places.in_order(batch, seq, draw(st.integers(0, 30)), draw(st.sampled_from([1, 1, 2, 3])))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    lengths = draw(st.sampled_from([(1, 4), (5, 20)]))
    positions, documents = np.zeros((2, batch, seq), np.int64)
    for row in range(batch):
        if row and rng.random() < 0.4:
            positions[row], documents[row] = positions[row - 1], documents[row - 1] + 7
            continue
        start = 0
        while start < seq:
            stretch = slice(start, min(seq, start + int(rng.integers(*lengths, endpoint=True))))
            first, step = (rng.integers(0, 20), rng.integers(1, 4)) if kind == "pieces" else (0, 1)
            positions[row, stretch] = first + step * np.arange(stretch.stop - start)
            documents[row, stretch] = rng.integers(0, 3) if kind == "pieces" else start
            start = stretch.stop
        if kind in ("shuffled", "chunks"):
            order = rng.permutation(seq)
            if kind == "chunks":
                positions[row], documents[row] = np.arange(seq) + rng.integers(0, 30), 0
                order = np.concatenate(
                    [np.arange(seq)[4:9], np.arange(seq)[9:], np.arange(seq)[:4]][:: rng.choice([1, -1])]
                )
            positions[row], documents[row] = positions[row, order], documents[row, order]
    return Places.of(positions, documents)


@st.composite
def cases(draw: st.DrawFn, longest: int = 40) -> Case:
    """Tiles whose keys are the queries' own, or stand anywhere else."""
    queries = draw(grids(draw(st.integers(1, 3)), longest))
    keys = queries if draw(st.booleans()) else draw(grids(queries.batch, longest))
    head_dim, kv_heads = draw(st.sampled_from([1, 2, 5, 16])), draw(st.integers(1, 3))
    scale = draw(st.sampled_from([head_dim**-0.5, 0.3]))
    tile = Tile(queries, keys, draw(masks()), scale, draw(st.integers(0, 3)))
    return Case(tile, kv_heads * draw(st.integers(1, 3)), kv_heads, head_dim, draw(st.integers(0, 2**31)))


def split(tile: Tile, count: int, seed: int) -> list[tuple[Tile, Tensor]]:
    """Tiles whose keys are those of `tile` dealt out at random, each with the numbers of its keys."""
    owner = torch.randint(count, (tile.keys.seq,), generator=torch.Generator().manual_seed(seed))
    parts = [(owner == number).nonzero()[:, 0] for number in range(count)]
    positions, documents = tile.keys.positions(), tile.keys.documents()
    return [(replace(tile, keys=Places.of(positions[:, part], documents[:, part])), part) for part in parts]
