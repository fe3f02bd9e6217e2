"""Triton's rows of softmax against float64 and against plain torch, in the interpreter or on a GPU."""

import interpreter
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from armillary.kernels import softmax_rows as plain
from armillary.kernels.cross_entropy import IGNORE, linear_cross_entropy

interpreter.install()
from armillary.kernels import cross_entropy_triton as ours  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAN = float("nan")


def case(
    num_rows: int, vocab: int, padding: int, dtype: torch.dtype, ignored: float, scale: float = 3.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A buffer whose padding and ignored rows are NaN, and labels that are every second element of their memory."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.full((num_rows, vocab + padding), NAN, dtype=dtype)
    buffer[:, :vocab] = torch.randn(num_rows, vocab, generator=generator) * scale
    labels = torch.randint(0, vocab, (2 * num_rows,), generator=generator)[::2]
    skip = torch.rand(num_rows, generator=generator) < ignored
    buffer[skip] = NAN
    labels[skip] = IGNORE
    return buffer.to(DEVICE), labels.to(DEVICE)


def truth(logits: Tensor, labels: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Losses and gradient in float64."""
    logits = logits.double().nan_to_num(0).requires_grad_()
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE)
    losses = losses + z_loss * torch.logsumexp(logits, 1).square() * (labels != IGNORE)
    (slope,) = torch.autograd.grad(losses.sum(), logits)
    return losses.detach(), slope


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 6),
    st.integers(1, 400),
    st.integers(0, 60),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 0.4, 1.0]),
    st.sampled_from([0.0, 1e-2]),
    st.sampled_from([128, 256, 8192]),
    st.integers(0, 9),
)
def test_losses_and_slopes(
    num_rows: int, vocab: int, padding: int, dtype: torch.dtype, ignored: float, z_loss: float, block: int, seed: int
) -> None:
    buffer, labels = case(num_rows, vocab, padding, dtype, ignored, seed=seed)
    losses, slope = truth(buffer[:, :vocab], labels, z_loss)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "MAX_BLOCK", block)
        got = ours.softmax_rows(buffer, vocab, labels, z_loss, slope=True)
    torch.testing.assert_close(got.double(), losses, rtol=1e-5, atol=1e-5)
    # Half a unit in the last place of the dtype, and float32's errors.
    torch.testing.assert_close(buffer[:, :vocab].double(), slope, rtol=torch.finfo(dtype).eps / 2, atol=1e-6)
    assert (buffer[:, vocab:] == 0).all()
    skip = labels == IGNORE
    assert (got[skip] == 0).all()
    assert (buffer[skip] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [127, 8193, 50257, 262144])
def test_large_vocabularies_and_bits(dtype: torch.dtype, vocab: int) -> None:
    """At most twice plain torch's error against float64, and float32's last two bits; the same bits in every run."""
    buffer, labels = case(2, vocab, -vocab % 64, dtype, 0)
    logits = buffer[:, :vocab].clone()
    losses, slope = truth(logits, labels, 0)
    again = buffer.clone()
    got = ours.softmax_rows(buffer, vocab, labels, 0.0, slope=True)
    assert torch.equal(got, ours.softmax_rows(again, vocab, labels, 0.0, slope=True))
    assert torch.equal(buffer, again)
    baseline = plain.softmax_rows(logits, labels, None, 0.0)
    assert (got - losses).abs().max() <= 2 * (baseline - losses).abs().max() + 1e-6
    for measure in (torch.amax, torch.mean):
        error, worst, size = (measure(t.abs().flatten(), 0) for t in (buffer[:, :vocab] - slope, logits - slope, slope))
        assert error <= 2 * worst + 2 * torch.finfo(torch.float32).eps * size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_very_large_logits(dtype: torch.dtype) -> None:
    buffer, labels = case(5, 300, 20, dtype, 0, scale=1e4)
    losses, slope = truth(buffer[:, :300], labels, 0)
    got = ours.softmax_rows(buffer, 300, labels, 0.0, slope=True)
    torch.testing.assert_close(got.double(), losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(buffer[:, :300].double(), slope, rtol=torch.finfo(dtype).eps / 2, atol=1e-6)


def test_large_logits_lose_no_digits_of_the_loss() -> None:
    """A loss of about 1 beside logits of 1e6, whose float32 neighbours are 0.06 apart."""
    buffer = torch.tensor([[1e6, 1e6 - 0.5, 1e6 + 0.5]], device=DEVICE)
    labels = torch.tensor([1], device=DEVICE)
    losses, slope = truth(buffer, labels, 0)
    got = ours.softmax_rows(buffer, 3, labels, 0.0, slope=True)
    torch.testing.assert_close(got.double(), losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(buffer.double(), slope, rtol=1e-6, atol=0)


def test_infinite_logits_and_bad_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """-inf is a token that cannot be; whatever torch finds in the rest, we find. A label beyond the vocabulary: NaN."""
    monkeypatch.setattr(ours, "MAX_BLOCK", 128)
    buffer, labels = case(6, 300, 20, torch.float32, 0)
    labels.fill_(290)
    buffer[0, :200] = -torch.inf
    buffer[1, 290] = -torch.inf
    buffer[2] = -torch.inf
    buffer[3, 5] = torch.inf
    buffer[4, 5] = NAN
    logits = buffer[:, :300].double().requires_grad_()
    want = F.cross_entropy(logits, labels, reduction="none")
    (slope,) = torch.autograd.grad(want[:2].sum(), logits)
    got = ours.softmax_rows(buffer, 300, labels, 0.0, slope=True)
    torch.testing.assert_close(got.double(), want.detach(), rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(buffer[:2, :300].double(), slope[:2], rtol=1e-6, atol=1e-6)
    assert want[1] == torch.inf
    assert want[2:5].isnan().all()
    for bad in (300, 310, -1):
        buffer, labels = case(1, 300, 20, torch.float32, 0)
        assert ours.softmax_rows(buffer, 300, labels.fill_(bad), 0.0, slope=True).isnan().all()


def test_without_slope_nothing_is_written() -> None:
    buffer, labels = case(4, 300, 20, torch.bfloat16, 0.5, seed=1)
    before = buffer.clone()
    losses = ours.softmax_rows(buffer, 300, labels, 0.1, slope=False)
    assert torch.equal(before.view(torch.int16), buffer.view(torch.int16))
    assert torch.equal(losses, ours.softmax_rows(buffer, 300, labels, 0.1, slope=True))


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 20), st.integers(1, 8), st.integers(1, 200), st.integers(1, 25), st.sampled_from([0.0, 0.05]),
    st.sampled_from([torch.bfloat16, torch.float32]),
)  # fmt: skip
def test_dispatch(tokens: int, dim: int, vocab: int, chunk: int, z_loss: float, dtype: torch.dtype) -> None:
    """The public function with Triton's rows is the public function with torch's, NaN in ignored rows included."""
    generator = torch.Generator().manual_seed(tokens + vocab)
    hidden = torch.randn(tokens, dim, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(vocab, dim, generator=generator).to(DEVICE, dtype).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=generator).to(DEVICE)
    labels[::3] = IGNORE
    hidden[::3] = NAN
    hidden.requires_grad_()
    results = []
    for choice in ("torch", "triton"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ARMILLARY_KERNELS", f"cross_entropy={choice}")
            loss = linear_cross_entropy(hidden, weight, labels, chunk, z_loss=z_loss)
            with torch.no_grad():
                assert torch.equal(linear_cross_entropy(hidden, weight, labels, chunk, z_loss=z_loss), loss)
        results.append((loss.detach(), *torch.autograd.grad(loss * 0.5, (hidden, weight))))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    for got, want in zip(results[1][1:], results[0][1:], strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, rtol=0, atol=2 * torch.finfo(dtype).eps * float(want.abs().max() + 1))


def test_triton_is_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARMILLARY_KERNELS", "cross_entropy=triton")
    calls = []
    launch = ours.softmax_rows
    monkeypatch.setattr(ours, "softmax_rows", lambda *args: calls.append(1) or launch(*args))
    hidden, weight = torch.ones(5, 4, device=DEVICE), torch.ones(3, 4, device=DEVICE)
    linear_cross_entropy(hidden, weight, torch.zeros(5, dtype=torch.int64, device=DEVICE), chunk=2)
    assert len(calls) == 3
