"""The fused projection and loss against the two steps written out."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from armillary.kernels.cross_entropy import IGNORE, linear_cross_entropy


def inputs(tokens: int, dim: int, vocab: int, ignored: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, dim, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(vocab, dim, dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    return hidden, weight, labels.masked_fill(torch.rand(tokens, generator=generator) < ignored, IGNORE)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum", ignore_index=IGNORE)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 8),
    st.integers(2, 30),
    st.sampled_from([0.0, 0.4, 1.0]),
    st.integers(1, 25),
    st.integers(0, 9),
)
def test_loss_and_gradients(tokens: int, dim: int, vocab: int, ignored: float, chunk: int, seed: int) -> None:
    hidden, weight, labels = inputs(tokens, dim, vocab, ignored, seed)
    ours, truth = linear_cross_entropy(hidden, weight, labels, chunk), plain(hidden, weight, labels)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(ours * 0.37, (hidden, weight))
    want = torch.autograd.grad(truth * 0.37, (hidden, weight))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_gradcheck() -> None:
    hidden, weight, labels = inputs(7, 3, 5, 0.3)
    assert torch.autograd.gradcheck(lambda a, b: linear_cross_entropy(a, b, labels, chunk=2), (hidden, weight))


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


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_extreme_logits(scale: float) -> None:
    hidden, weight, labels = inputs(16, 8, 40)
    hidden = (hidden.detach() * scale).requires_grad_()
    ours, truth = linear_cross_entropy(hidden, weight, labels, 5), plain(hidden, weight, labels)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=0)
    got, want = torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(truth, (hidden, weight))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_low_precision(dtype: torch.dtype, tolerance: float) -> None:
    """No worse than rounding the inputs' products once, though the sums run over 40 chunks."""
    hidden, weight, labels = (t.detach() for t in inputs(640, 16, 50))
    hidden, weight = (t.to(dtype).requires_grad_() for t in (hidden, weight / 4))
    loss = linear_cross_entropy(hidden, weight, labels, chunk=16)
    assert loss.dtype == torch.float32
    got = torch.autograd.grad(loss, (hidden, weight))
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    truth = plain(wide[0], wide[1], labels)
    torch.testing.assert_close(loss.double(), truth, rtol=tolerance / 4, atol=0)
    for ours, exact in zip(got, torch.autograd.grad(truth, wide), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=tolerance * float(exact.abs().max()))


def test_bfloat16_weight_gradient_is_summed_in_float32() -> None:
    """512 chunks of one token are no worse than one of 512: a bfloat16 sum would lose most of the small terms."""
    hidden, weight, labels = inputs(512, 4, 16)
    low = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight)]
    wide = [t.detach().double().requires_grad_() for t in low]
    (truth,) = torch.autograd.grad(plain(wide[0], wide[1], labels), wide[1:])
    many, one = (
        torch.autograd.grad(linear_cross_entropy(low[0], low[1], labels, chunk), low[1:])[0].double()
        for chunk in (1, 512)
    )
    assert (many - truth).norm() < 1.5 * (one - truth).norm()


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
