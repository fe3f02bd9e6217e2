"""A whole model by Triton's kernels against the same model in plain torch."""

from typing import Any

import interpreter
import pytest
import torch
from kernel_checks import DEVICE, kernels
from torch import Tensor

from armillary.train.model.shape import ModelConfig
from armillary.train.model.transformer import Transformer, initialise

interpreter.install()

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")

SHAPE: dict[str, Any] = {"dim": 48, "num_layers": 2, "num_heads": 3, "num_kv_heads": 1, "ffn_dim": 40, "vocab_size": 61}


def loss_and_gradients(choice: str, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Of a model with query and key norms and biases, whose norms are not all one."""
    model = Transformer(ModelConfig(**SHAPE, qk_norm=True, qkv_bias=True)).to(DEVICE)
    initialise(model, 3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (torch.randn(parameter.shape, generator=generator) * 0.2).to(DEVICE)
    model.to(dtype)
    tokens, labels = (torch.randint(0, 61, (2, 11), generator=generator).to(DEVICE) for _ in range(2))
    with kernels(choice):
        loss = model(tokens, labels=labels)
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "choice", ["norm=triton", "rope=triton", "swiglu=triton", "norm=triton,rope=triton,swiglu=triton"]
)
def test_float32_model_by_triton_is_the_model_by_torch(choice: str) -> None:
    loss, gradients = loss_and_gradients(choice, torch.float32)
    plain_loss, plain_gradients = loss_and_gradients("torch", torch.float32)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-6, atol=0)
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient - plain_gradients[name]).norm() <= 1e-5 * plain_gradients[name].norm(), name


def test_bfloat16_model_by_triton_is_as_near_to_float64() -> None:
    truth_loss, truth = loss_and_gradients("torch", torch.float64)
    losses, errors = [], []
    for choice in ("norm=triton,rope=triton,swiglu=triton", "torch"):
        loss, gradients = loss_and_gradients(choice, torch.bfloat16)
        losses.append((loss.double() - truth_loss).abs())
        errors.append(sum((gradients[name].double() - truth[name]).norm() / truth[name].norm() for name in truth))
    assert losses[0] <= 2 * losses[1] + 2e-3 * truth_loss
    assert errors[0] <= 1.25 * errors[1]
