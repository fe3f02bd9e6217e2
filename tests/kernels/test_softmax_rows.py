"""Logits that become their gradient in place, in plain torch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from armillary.kernels import softmax_rows as module
from armillary.kernels.softmax_rows import IGNORE, softmax_rows


def case(num_rows: int, vocab: int, scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocab, dtype=torch.float64, generator=generator) * scale
    return logits, torch.randint(0, vocab, (num_rows,), generator=generator)


def truth(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses, and the gradient of their sum."""
    logits = logits.detach().requires_grad_()
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE)
    return losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12), st.integers(1, 60), st.integers(1, 200), st.sampled_from([3.0, 1e4]), st.integers(0, 9))
def test_rows(num_rows: int, vocab: int, block: int, scale: float, seed: int) -> None:
    """Whatever fits a block."""
    logits, labels = case(num_rows, vocab, scale, seed)
    labels[::3] = IGNORE
    losses, slope = truth(logits, labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.BLOCK_LOGITS, "cpu", block)
        got = softmax_rows(logits, labels, None, 0.0)
    torch.testing.assert_close(got, losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits, slope, rtol=1e-12, atol=1e-12)
    assert (got[::3] == 0).all()
    assert (logits[::3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    logits, labels = case(40, 300)
    low = logits.to(dtype)
    losses, slope = truth(low.double(), labels)
    got = softmax_rows(low, labels, None, 0.0)
    torch.testing.assert_close(got.double(), losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(low.double(), slope, rtol=torch.finfo(dtype).eps / 2, atol=5e-7)


def test_large_logits_lose_no_digits_of_the_loss() -> None:
    """A loss of about 1 beside logits of 1e6, whose float32 neighbours are 0.06 apart."""
    logits = torch.tensor([[1e6, 1e6 - 0.5, 1e6 + 0.5]])
    losses, slope = truth(logits.double(), torch.tensor([1]))
    got = softmax_rows(logits, torch.tensor([1]), None, 0.0)
    torch.testing.assert_close(got.double(), losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.double(), slope, rtol=1e-6, atol=0)


def test_infinite_logits() -> None:
    """-inf is a token that cannot be; a row without a finite logit, and +inf, are NaN as they are in torch."""
    logits, labels = case(4, 30)
    labels.fill_(29)
    logits[0, :20] = -torch.inf
    logits[1, 29] = -torch.inf
    logits[2] = -torch.inf
    logits[3, 5] = torch.inf
    losses, slope = truth(logits, labels)
    assert losses[1] == torch.inf
    assert losses[2:].isnan().all()
    torch.testing.assert_close(softmax_rows(logits, labels, None, 0.0), losses, equal_nan=True)
    torch.testing.assert_close(logits[:2], slope[:2])


@pytest.mark.parametrize("label", [30, -1, -101])
def test_a_label_beyond_the_vocabulary_is_nan(label: int) -> None:
    logits, labels = case(2, 30)
    labels[1] = label
    assert softmax_rows(logits, labels, None, 0.0).isnan().tolist() == [False, True]
