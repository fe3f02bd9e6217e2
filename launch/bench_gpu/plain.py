"""What the layers' kernels are compared with: the same by plain torch, in the dtype of the inputs or in float64."""

import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.kernels.cross_entropy import IGNORE

EPS = 1e-5


def wide(x: Tensor) -> Tensor:
    """float32, or float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def plain_norm(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    numbers = wide(x)
    return (numbers * (numbers.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * weight


def plain_norm_of_sum(x: Tensor, residual: Tensor, weight: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    total = x + residual
    return plain_norm(total, weight, eps), total


def plain_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    turned = []
    for x in (q, k):
        a, b = wide(x).chunk(2, -1)
        turned.append(torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype))
    return turned[0], turned[1]


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def plain_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    first, second = ((side - lse).exp().transpose(1, 2)[..., None] for side in (lse_a, lse_b))
    return (first * out_a + second * out_b).to(out_a.dtype), lse


def plain_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = wide(F.linear(hidden, weight))
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


def chunked_loss(hidden: Tensor, weight: Tensor, labels: Tensor, size: int) -> Tensor:
    """Logits of a part of the tokens at a time, computed again for their gradients."""
    from torch.utils.checkpoint import checkpoint

    parts = zip(hidden.split(size), labels.split(size), strict=True)
    losses = [checkpoint(plain_loss, part, weight, label, use_reentrant=False) for part, label in parts]
    return torch.stack(losses).sum()
