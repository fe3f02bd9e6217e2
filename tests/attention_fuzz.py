"""What fuzzes Triton's attention kernels: small calls of every kind, and the rule by which a result is right.

The rule for errors is FlashAttention's own: at most twice that of the same sums written in plain torch in the same
dtype, and a floor of one rounding of the result and of what is summed to it (a gradient that is 0 in truth is the
difference of two sums). A mean is held to it too, since a maximum hides one bad tile behind another.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from tile_cases import masks
from torch import Tensor

from armillary.kernels.attention.call import row_dots
from armillary.kernels.attention.configs import BlockConfig
from armillary.kernels.attention.places import Places
from armillary.kernels.attention.reference import reference
from armillary.kernels.attention.tiles import Tile
from armillary.launch.bench_gpu.correctness import formula


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of the kernels, small: the interpreter takes milliseconds a tile."""

    tile: Tile
    kv_heads: int
    group: int
    head_dim: int
    config: BlockConfig
    into: bool
    """Whether the forward pass folds into another result, and the backward pass adds to buffers."""
    seed: int

    def tensor(self, number: int, seq: int, heads: int, dtype: torch.dtype) -> Tensor:
        """Normal numbers (batch, seq, heads, head_dim), inside a larger tensor that is NaN all around them."""
        generator = torch.Generator().manual_seed(self.seed + number)
        shape = (self.tile.queries.batch, seq, heads, self.head_dim)
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        around = torch.full((shape[0], seq + 2, heads + 1, self.head_dim + 3), math.nan, dtype=dtype)
        inside = around[:, 1 : 1 + seq, 1:, 2 : 2 + self.head_dim]
        return inside.copy_(values)


@st.composite
def grids(draw: st.DrawFn, batch: int, documents: int) -> Places:
    """Rows of runs: a tile of a ring at any offset and step, packed documents, chunks of one document, any order."""
    kind = draw(st.sampled_from(["run", "run", "packed", "chunks", "shuffled"]))
    if kind == "run":
        return Places.in_order(
            batch, draw(st.integers(0, 40)), draw(st.integers(0, 50)), draw(st.sampled_from([1, 1, 3]))
        )
    if kind == "shuffled":
        order = np.array(draw(st.permutations(range(draw(st.integers(1, 6))))))
        return Places.of(np.tile(order, (batch, 1)), np.tile(order % documents, (batch, 1)))
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    chosen = draw(st.permutations(range(4)))
    positions, numbers = [], []
    for index, length in enumerate(lengths):
        first = 0 if kind == "packed" else draw(st.integers(0, 60))
        positions += [first + i for i in range(length)]
        numbers += [chosen[index] if kind == "packed" else 0] * length
    return Places.of(np.tile(positions, (batch, 1)), np.tile(numbers, (batch, 1)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch = draw(st.sampled_from([1, 1, 1, 2]))
    queries = draw(grids(batch, 2))
    keys = queries if draw(st.booleans()) else draw(grids(batch, 2))
    tile = Tile(queries, keys, draw(masks()), draw(st.sampled_from([0.125, 0.3, 1.0])), draw(st.integers(0, 2)))
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 1), (1, 2), (2, 1), (1, 3)]))
    config = BlockConfig(draw(st.sampled_from([16, 32])), draw(st.sampled_from([16, 32])), 4, 2)
    head_dim = draw(st.sampled_from([8, 16, 16, 24, 32]))
    return Case(tile, kv_heads, group, head_dim, config, draw(st.booleans()), draw(st.integers(0, 2**31)))


def gradients(call: Any, inputs: list[Tensor], d_out: Tensor, tile: Tile) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out, _ = call(*leaves, tile)
    return list(torch.autograd.grad(out, leaves, d_out.to(out.dtype)))


def assert_close(name: str, got: Tensor, truth: Tensor, peer: Tensor, dtype: torch.dtype, grain: float) -> None:
    """The rule of this file; `peer` is `formula`'s on inputs of `dtype`, `grain` a rounding of the largest number on
    the way."""
    got, peer = got.double(), peer.double()
    assert got.isfinite().all(), f"{name} is not finite"
    if not got.numel():
        return
    narrow = truth.to(dtype).double()
    floor = 2 * (narrow - truth).abs().max() + grain
    error, allowed = (got - truth).abs(), (peer - truth).abs()
    assert error.max() <= 2 * allowed.max() + floor, f"{name}: {error.max():.2e} against {allowed.max():.2e}"
    assert error.mean() <= 2 * allowed.mean() + floor / 2, f"{name}: mean {error.mean():.2e}"


def before(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the forward pass folds into: a result over other keys, none of which some rows saw."""
    out = case.tensor(4, case.tile.queries.seq, case.kv_heads * case.group, dtype)
    lse = 3 * case.tensor(5, case.tile.queries.seq, case.kv_heads * case.group, torch.float32)[..., 0].transpose(1, 2)
    none = lse > 2
    return out.masked_fill(none.transpose(1, 2)[..., None], math.nan), lse.masked_fill(none, -math.inf)


def folded(case: Case, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`new`, or for `into` the result over its keys and those of `before`."""
    if not case.into:
        return new
    old = before(case, torch.float32)
    lse = torch.logaddexp(old[1].to(new[1].dtype), new[1])
    weights = [torch.where(part[1] == -math.inf, 0, (part[1] - lse).exp()).transpose(1, 2) for part in (old, new)]
    parts = [torch.where(w[..., None] == 0, 0, w[..., None] * p[0]) for w, p in zip(weights, (old, new), strict=True)]
    return parts[0] + parts[1], lse


def run(case: Case, dtype: torch.dtype, module: Any) -> list[Tensor]:
    """out, lse and the gradients of q, k and v, in buffers that held NaN, or for `into` other results."""
    tile, heads = case.tile, case.kv_heads * case.group
    q = case.tensor(0, tile.queries.seq, heads, dtype)
    k, v = (case.tensor(i, tile.keys.seq, case.kv_heads, dtype) for i in (1, 2))
    d_out = case.tensor(3, tile.queries.seq, heads, dtype)
    out, lse = before(case, torch.float32 if case.into else dtype)
    results = torch.float32 if case.into else dtype
    grads = [torch.full_like(tensor, 0.5 if case.into else math.nan, dtype=results) for tensor in (q, k, v)]
    if not case.into:
        out, lse = out.fill_(math.nan), lse.fill_(math.nan)
    if q.numel():
        module.forward(q, k, v, tile, out, lse, case.into, case.config)
        truth_out, truth_lse = reference(q, k, v, tile)
        delta = row_dots(truth_out, d_out.double(), truth_lse).float()
        module.backward(
            d_out, q, k, v, truth_lse.float(), delta, tile, tuple(grads), (case.into,) * 3, (case.config,) * 2
        )
    elif not case.into:
        for gradient in grads:
            gradient.zero_()
    return [out, lse, *(gradient - 0.5 if case.into else gradient for gradient in grads)]


def check(case: Case, dtype: torch.dtype, module: Any) -> None:
    """Raises AssertionError where the kernels are further from the truth than the rule allows."""
    tile, heads = case.tile, case.kv_heads * case.group
    inputs = [case.tensor(0, tile.queries.seq, heads, dtype)]
    inputs += [case.tensor(i, tile.keys.seq, case.kv_heads, dtype) for i in (1, 2)]
    d_out = case.tensor(3, tile.queries.seq, heads, dtype)
    out, lse, *grads = run(case, dtype, module)
    truth_out, truth_lse = folded(case, reference(*inputs, tile))
    peer_out, _ = folded(case, formula(*inputs, tile))
    highest = [float(t.abs().max()) if t.numel() else 0.0 for t in (*inputs, d_out)]
    eps = 4 * 2.0**-24
    assert_close("out", out, truth_out, peer_out, dtype, eps * highest[2] * case.head_dim)
    blind = truth_lse == -math.inf
    assert torch.equal(lse == -math.inf, blind), "a row that sees nothing has log-sum-exp -inf, and only such a row"
    assert ((lse - truth_lse).masked_fill(blind, 0).abs() <= 1e-5 * truth_lse.abs().clamp(min=1)).all(), "lse"
    assert (out.transpose(1, 2)[blind] == 0).all(), "a row that sees nothing is 0"
    truths = gradients(reference, [tensor.double() for tensor in inputs], d_out, tile)
    peers = gradients(formula, inputs, d_out, tile)
    slope = eps * case.head_dim * highest[3] * max(1.0, highest[2] * max(highest[:2]) * tile.scale)
    for name, got, truth, peer in zip("qkv", grads, truths, peers, strict=True):
        assert_close(f"d{name}", got, truth, peer, dtype, slope)
