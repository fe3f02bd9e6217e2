"""The fused projection and loss against the two steps written out."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from armillary.kernels import cross_entropy
from armillary.kernels.cross_entropy import IGNORE, VocabShard, linear_cross_entropy


def inputs(tokens: int, dim: int, vocab: int, ignored: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, dim, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(vocab, dim, dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    return hidden, weight, labels.masked_fill(torch.rand(tokens, generator=generator) < ignored, IGNORE)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0) -> Tensor:
    logits = F.linear(hidden, weight)
    loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE)
    return loss + z_loss * (torch.logsumexp(logits, 1).square() * (labels != IGNORE)).sum() if z_loss else loss


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 8),
    st.integers(2, 30),
    st.sampled_from([0.0, 0.4, 1.0]),
    st.one_of(st.none(), st.integers(1, 25)),
    st.sampled_from([0.0, 0.03]),
    st.integers(0, 9),
)
def test_loss_and_gradients(
    tokens: int, dim: int, vocab: int, ignored: float, chunk: int | None, z_loss: float, seed: int
) -> None:
    hidden, weight, labels = inputs(tokens, dim, vocab, ignored, seed)
    ours = linear_cross_entropy(hidden, weight, labels, chunk, z_loss=z_loss)
    truth = plain(hidden, weight, labels, z_loss)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(ours * 0.37, (hidden, weight))
    want = torch.autograd.grad(truth * 0.37, (hidden, weight))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_gradcheck(z_loss: float) -> None:
    hidden, weight, labels = inputs(7, 3, 5, 0.3)
    assert torch.autograd.gradcheck(
        lambda a, b: linear_cross_entropy(a, b, labels, chunk=2, z_loss=z_loss), (hidden, weight)
    )


def test_nothing_labelled_gives_exact_zeros() -> None:
    hidden, weight, labels = inputs(6, 4, 9)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, IGNORE), chunk=4)
    loss.backward()
    assert loss.item() == 0
    for tensor in (hidden, weight):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_garbage_in_ignored_rows_does_not_spread() -> None:
    hidden, weight, labels = inputs(8, 4, 9, 0.5, seed=3)
    ignored = labels == IGNORE
    assert 0 < ignored.sum() < 8
    want = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), (hidden, weight))
    spoilt = hidden.detach().masked_fill(ignored[:, None], float("nan")).requires_grad_()
    got = torch.autograd.grad(linear_cross_entropy(spoilt, weight, labels), (spoilt, weight))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e4])
def test_extreme_logits(scale: float) -> None:
    hidden, weight, labels = inputs(16, 8, 40)
    hidden = (hidden.detach() * scale).requires_grad_()
    ours, truth = linear_cross_entropy(hidden, weight, labels, 5), plain(hidden, weight, labels)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=0)
    got, want = torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(truth, (hidden, weight))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def errors(got: list[Tensor], exact: list[Tensor]) -> list[tuple[float, float]]:
    """Largest and mean error of each tensor."""
    differences = [(a.double() - b).abs() for a, b in zip(got, exact, strict=True)]
    return [(float(d.max()), float(d.mean())) for d in differences]


@pytest.mark.parametrize("emulated", [False, True])
@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 24),
    st.integers(2, 80),
    st.integers(1, 50),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.integers(0, 99),
)
def test_low_precision(
    emulated: bool, tokens: int, dim: int, vocab: int, chunk: int, dtype: torch.dtype, seed: int
) -> None:
    """At most twice the error of torch's two steps in the same dtype, however many chunks, on any CPU."""
    hidden, weight, labels = inputs(tokens, dim, vocab, 0.2, seed)
    low = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight)]
    wide = [t.detach().double().requires_grad_() for t in low]
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "_cpu_has_bfloat16", lambda: not emulated)
        for a, b, loss in (
            (*low, linear_cross_entropy(low[0], low[1], labels, chunk)),
            (*low, F.cross_entropy(F.linear(*low).float(), labels, reduction="sum", ignore_index=IGNORE)),
            (*wide, plain(wide[0], wide[1], labels)),
        ):
            results.append([loss.detach(), *torch.autograd.grad(loss, (a, b))])
    ours, baseline, exact = results
    assert [t.dtype for t in ours] == [torch.float32, dtype, dtype]
    for mine, theirs, t, e in zip(errors(ours, exact), errors(baseline, exact), ours, exact, strict=True):
        # A last place of the result's dtype, and float32's own noise in logits of size 10.
        size = float(e.abs().max())
        floor = torch.finfo(t.dtype).eps * size + 8 * torch.finfo(torch.float32).eps * (size + 1)
        assert mine[0] <= 2 * theirs[0] + floor
        assert mine[1] <= 2 * theirs[1] + floor / 4


@pytest.mark.parametrize("emulated", [False, True])
def test_bfloat16_weight_gradient_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch, emulated: bool) -> None:
    """512 chunks of one token are no worse than one of 512: a bfloat16 sum would lose most of the small terms."""
    monkeypatch.setattr(cross_entropy, "_cpu_has_bfloat16", lambda: not emulated)
    hidden, weight, labels = inputs(512, 4, 16)
    low = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight)]
    wide = [t.detach().double().requires_grad_() for t in low]
    (truth,) = torch.autograd.grad(plain(wide[0], wide[1], labels), wide[1:])
    many, one = (
        torch.autograd.grad(linear_cross_entropy(low[0], low[1], labels, chunk), low[1:])[0].double()
        for chunk in (1, 512)
    )
    assert (many - truth).norm() < 1.5 * (one - truth).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_run_gives_the_same_bits(dtype: torch.dtype) -> None:
    hidden, weight, labels = (t.detach() for t in inputs(70, 16, 90, 0.2))
    hidden, weight = (t.to(dtype).requires_grad_() for t in (hidden, weight))
    runs = []
    for _ in range(3):
        loss = linear_cross_entropy(hidden, weight, labels, 16, z_loss=0.01)
        runs.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_backward_may_run_twice() -> None:
    hidden, weight, labels = inputs(6, 4, 9)
    loss = linear_cross_entropy(hidden, weight, labels, 4)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(loss * 2, (hidden, weight))
    assert all(torch.equal(2 * a, b) for a, b in zip(first, again, strict=True))


def test_strides_are_free() -> None:
    hidden, weight, labels = inputs(12, 4, 9, 0.3)
    want = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, 5), (hidden, weight))
    odd = [t.detach().t().contiguous().t().requires_grad_() for t in (hidden, weight)]
    spread = torch.stack((labels, labels), 1)[:, 0]
    got = torch.autograd.grad(linear_cross_entropy(odd[0], odd[1], spread, 5), odd)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("wide_product", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_no_value_is_looked_at(monkeypatch: pytest.MonkeyPatch, wide_product: bool, sharded: bool) -> None:
    """Tensors of the meta device have no values: reading one, which on a GPU would wait for it, fails here."""
    monkeypatch.setattr(cross_entropy, "_returns_float32", lambda factor: wide_product)
    hidden, weight = (torch.empty(n, 4, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (10, 77))
    labels = torch.empty(10, dtype=torch.int64, device="meta")
    shard = VocabShard(0, 77, lambda tensor: tensor, lambda tensor: tensor) if sharded else None
    linear_cross_entropy(hidden, weight, labels, 4, shard, z_loss=0.1).backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16


def test_only_what_is_asked_for_is_computed() -> None:
    hidden, weight, labels = inputs(6, 4, 9)
    frozen = weight.detach()
    (got,) = torch.autograd.grad(linear_cross_entropy(hidden, frozen, labels, 4), (hidden,))
    torch.testing.assert_close(got, torch.autograd.grad(plain(hidden, weight, labels), (hidden,))[0])
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels, 4)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(hidden, weight, labels).detach())


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)]
        self.numel = max([self.numel, *(t.numel() for t in tensors)])
        return out


def test_never_holds_the_logits_of_all_tokens() -> None:
    hidden, weight, labels = inputs(64, 2, 100)
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, labels, chunk=8).backward()
    assert largest.numel == 8 * 100


def test_leading_dims_are_free() -> None:
    hidden, weight, labels = inputs(12, 4, 9, 0.3)
    flat = linear_cross_entropy(hidden, weight, labels)
    shaped = linear_cross_entropy(hidden.view(3, 4, 4), weight, labels.view(3, 4))
    assert torch.equal(flat, shaped)
