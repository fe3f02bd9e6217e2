"""The loss of an output matrix that is split over ranks is the loss of the whole, in turn and on real ranks."""

import functools
import os
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import interpreter
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from armillary.comm import collectives
from armillary.comm.ledger import Ledger
from armillary.kernels import cross_entropy
from armillary.kernels.cross_entropy import IGNORE, VocabShard, linear_cross_entropy

interpreter.install()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def inputs(
    tokens: int, dim: int, vocab: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, dim, dtype=torch.float64, generator=generator)
    weight = torch.randn(vocab, dim, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.3] = IGNORE
    hidden[labels == IGNORE] = float("nan")
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), labels.to(DEVICE)


def whole(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float) -> list[Tensor]:
    """Loss and both gradients in float64, unfused."""
    hidden = hidden.double().masked_fill((labels == IGNORE)[:, None], 0).requires_grad_()
    weight = weight.double().requires_grad_()
    logits = F.linear(hidden, weight)
    loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE)
    loss = loss + z_loss * (torch.logsumexp(logits, 1).square() * (labels != IGNORE)).sum()
    return [loss.detach(), *torch.autograd.grad(loss * 0.37, (hidden, weight))]


def share(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None, shard: VocabShard, z: float
) -> list[Tensor]:
    """What one rank computes from its rows."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, chunk, shard, z)
    return [loss.detach(), *torch.autograd.grad(loss * 0.37, (hidden, weight))]


def in_turn(step: Callable[[int, VocabShard], Any], sizes: Sequence[int]) -> list[Any]:
    """Runs all ranks one after another, three times over: a pass reduces with what the pass before it recorded.

    The first maxima are right whatever the reductions give, the sums once the maxima are known, and then all is.
    """
    known: dict[str, list[Tensor]] = {}
    for kind, combine in (("max", torch.maximum), ("sum", torch.add), ("", None)):
        results, recorded = [], []
        for rank in range(len(sizes)):
            calls: dict[str, list[Tensor]] = {"max": [], "sum": []}

            def reduce(kind: str, tensor: Tensor, calls: Any = calls) -> Tensor:
                calls[kind].append(tensor.clone())
                return known[kind][len(calls[kind]) - 1].clone() if kind in known else tensor

            first = sum(sizes[:rank])
            shard = VocabShard(first, max(sizes), functools.partial(reduce, "max"), functools.partial(reduce, "sum"))
            results.append(step(rank, shard))
            recorded.append(calls)
        if combine:
            per_call = zip(*(calls[kind] for calls in recorded), strict=True)
            known[kind] = [functools.reduce(combine, tensors) for tensors in per_call]
    return results


def split(weight: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    ends = list(accumulate(sizes))
    return [weight[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def put_together(shares: list[list[Tensor]]) -> list[Tensor]:
    """Loss, hidden gradient and weight gradient of all ranks; the losses must be the same bits."""
    losses, d_hidden, d_weight = zip(*shares, strict=True)
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    return [losses[0], torch.stack(d_hidden).double().sum(0), torch.cat(d_weight)]


@settings(max_examples=30, deadline=None)
@given(
    SIZES, st.integers(1, 20), st.integers(1, 6), st.one_of(st.none(), st.integers(1, 25)),
    st.sampled_from([0.0, 0.03]), st.integers(0, 9),
)  # fmt: skip
def test_ranks_in_turn(sizes: list[int], tokens: int, dim: int, chunk: int | None, z_loss: float, seed: int) -> None:
    hidden, weight, labels = inputs(tokens, dim, sum(sizes), seed)
    parts = split(weight, sizes)
    got = in_turn(lambda rank, shard: share(hidden, parts[rank], labels, chunk, shard, z_loss), sizes)
    torch.testing.assert_close(put_together(got), whole(hidden, weight, labels, z_loss), **EXACT)


@settings(max_examples=12, deadline=None)
@given(
    SIZES, st.integers(1, 20), st.integers(1, 25), st.sampled_from([0.0, 0.03]),
    st.sampled_from([torch.bfloat16, torch.float32]), st.sampled_from(["torch", "triton"]),
)  # fmt: skip
def test_low_precision_in_turn(
    sizes: list[int], tokens: int, chunk: int, z_loss: float, dtype: torch.dtype, kernels: str
) -> None:
    hidden, weight, labels = inputs(tokens, 8, sum(sizes), dtype=dtype)
    parts = split(weight, sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARMILLARY_KERNELS", f"cross_entropy={kernels}")
        got = in_turn(lambda rank, shard: share(hidden, parts[rank], labels, chunk, shard, z_loss), sizes)
    for ours, exact in zip(put_together(got), whole(hidden, weight, labels, z_loss), strict=True):
        # Logits of size 5 are themselves rounded to the dtype.
        bound = 8 * torch.finfo(dtype).eps * float(exact.abs().max() + 1)
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=bound)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_one_shard_of_all_is_the_whole(monkeypatch: pytest.MonkeyPatch, kernels: str) -> None:
    """Two ways to the same sums; ours reduces twice a chunk, a maximum and then three sums for each token."""
    monkeypatch.setenv("ARMILLARY_KERNELS", f"cross_entropy={kernels}")
    hidden, weight, labels = inputs(10, 4, 30, dtype=torch.float32)
    shapes: list[tuple[str, torch.Size]] = []

    def same(name: str, tensor: Tensor) -> Tensor:
        shapes.append((name, tensor.shape))
        return tensor

    shard = VocabShard(0, 30, functools.partial(same, "max"), functools.partial(same, "sum"))
    got = share(hidden, weight, labels, 4, shard, 0.0)
    want = [tensor.float() for tensor in whole(hidden, weight, labels, 0.0)]
    torch.testing.assert_close(got, want)
    assert shapes == [call for rows in (4, 4, 2) for call in (("max", (rows,)), ("sum", (3, rows)))]


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("firsts", [(0, 6), (0, 4)])
def test_gaps_and_overlaps_are_nan(monkeypatch: pytest.MonkeyPatch, kernels: str, firsts: tuple[int, int]) -> None:
    """A token that no rank holds, or two hold, is a mistake in the plan that no loss may hide."""
    monkeypatch.setenv("ARMILLARY_KERNELS", f"cross_entropy={kernels}")
    hidden, weight, _ = inputs(1, 4, 5, dtype=torch.float32)
    labels = torch.full((1,), 5 if firsts[1] == 6 else 4, device=DEVICE)

    def step(rank: int, shard: VocabShard) -> Tensor:
        moved = VocabShard(firsts[rank], 5, shard.reduce_max, shard.reduce_sum)
        return linear_cross_entropy(hidden.nan_to_num(0), weight, labels, 4, moved)

    assert all(loss.isnan() for loss in in_turn(step, [5, 5]))


def test_ranks_cut_the_tokens_alike_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that followed a rank's own rows would leave the ranks waiting for each other's reductions."""
    monkeypatch.setitem(cross_entropy.CHUNK_LOGITS, DEVICE, 300 * 31)
    hidden, weight, labels = inputs(700, 2, 32)
    parts = split(weight, [1, 31])
    got = in_turn(lambda rank, shard: share(hidden, parts[rank], labels, None, shard, 0.0), [1, 31])
    torch.testing.assert_close(put_together(got), whole(hidden, weight, labels, 0.0), rtol=1e-11, atol=1e-11)


def test_large_logits_lose_no_digits() -> None:
    hidden, weight, labels = inputs(12, 4, 30)
    hidden = hidden * 1e4
    parts = split(weight, [7, 0, 23])
    got = in_turn(lambda rank, shard: share(hidden, parts[rank], labels, 5, shard, 0.0), [7, 0, 23])
    torch.testing.assert_close(put_together(got), whole(hidden, weight, labels, 0.0), rtol=1e-12, atol=1e-9)


def on_a_rank(rank: int, sizes: list[int], chunk: int | None, dtype: str, kernels: str) -> dict[str, Any]:
    os.environ["ARMILLARY_KERNELS"] = f"cross_entropy={kernels}"
    torch.manual_seed(0)
    group, ledger = dist.group.WORLD, Ledger()
    hidden, weight, labels = inputs(23, 5, sum(sizes), dtype=getattr(torch, dtype))

    def reduce(op: Any, tensor: Tensor) -> Tensor:
        return collectives.all_reduce(tensor, group=group, ledger=ledger, purpose="loss", op=op)

    shard = VocabShard(
        sum(sizes[:rank]),
        max(sizes),
        functools.partial(reduce, dist.ReduceOp.MAX),
        functools.partial(reduce, dist.ReduceOp.SUM),
    )
    runs = [share(hidden, split(weight, sizes)[rank], labels, chunk, shard, 0.01) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    loss, d_hidden, d_weight = runs[0]
    collectives.all_reduce(d_hidden, group=group, ledger=ledger, purpose="hidden")
    want = whole(hidden, weight, labels, 0.01)
    want[2] = split(want[2], sizes)[rank]
    errors = [
        float((a - b).abs().max()) if b.numel() else 0.0 for a, b in zip((loss, d_hidden, d_weight), want, strict=True)
    ]
    return {"loss": float(loss), "errors": errors, "calls": ledger.entries["loss", "all_reduce"].calls}


@pytest.mark.parametrize("sizes", [[40], [13, 27], [17, 0, 23], [1, 38, 1]])
@pytest.mark.parametrize(("dtype", "kernels", "bound"), [("float64", "torch", 1e-12), ("float32", "triton", 1e-4)])
def test_real_ranks(world: Callable[..., list[Any]], sizes: list[int], dtype: str, kernels: str, bound: float) -> None:
    facts = world(on_a_rank, len(sizes), sizes, 9, dtype, kernels)
    assert len({fact["loss"] for fact in facts}) == 1
    for fact in facts:
        assert max(fact["errors"]) < bound
        # Three chunks of at most 9 tokens, two reductions each, two runs.
        assert fact["calls"] == 12
