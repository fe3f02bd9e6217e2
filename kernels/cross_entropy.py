"""Output projection and cross entropy in one, without ever holding the logits of all tokens."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from armillary.kernels.select import use_triton
from armillary.kernels.softmax_rows import IGNORE, softmax_rows
from armillary.kernels.vocab_shard import VocabShard

__all__ = ["IGNORE", "VocabShard", "linear_cross_entropy"]

CHUNK_LOGITS = {"cpu": 2**21, "cuda": 2**28}
"""How many logits are held at once: enough that adding up the weight's gradient costs little beside its products."""

BLOCK_PRODUCT = {"cpu": 2**19, "cuda": 2**26}
"""How many elements of a product are added to a wider sum at once: on the CPU what fits its caches."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk: int | None = None,
    shard: VocabShard | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """SUM over labelled tokens of the cross entropy of `hidden @ weight.T`, a 0-d tensor.

    hidden (..., dim), weight (vocab, dim), labels (...) int64; labels equal to IGNORE count nothing, so that a batch
    of them gives exactly 0 and zero gradients. The softmax and the weight's gradient are float32 (float64 for float64
    input), and so is the result. `chunk` tokens are computed at a time, by default as many as suit the device.
    `z_loss` adds z_loss * logsumexp(logits)^2 of each labelled token, which keeps logits small (PaLM, Chowdhery et
    al. 2022). A label beyond the vocabulary makes the result NaN; nothing waits for a GPU to say so.

    Both gradients are computed in the forward pass, chunk by chunk, while the logits are at hand: three matrix
    products altogether, as without chunks. Source: Liger Kernel (Hsu et al. 2024), which sums the weight's gradient
    in its own dtype; ours is float32.

    With `shard`, `weight` is this rank's rows of the whole matrix and all ranks pass the same hidden tokens, labels,
    chunk and z_loss. The result is the whole loss, equal on all ranks, and the weight's gradient that of this rank's
    rows, exact. The gradient of `hidden` is this rank's share, a partial sum: THE CALLER MUST SUM IT OVER THE RANKS.
    It is left to the caller because the sum is as large as the activations and a tensor-parallel layer knows what to
    do with it: reduce-scatter it for sequence parallelism, hide it behind other work, or sum it with others.
    Each chunk costs two reductions, the rows' maximum and then three sums a row, 16 bytes a token in all. One pair of
    calls for all chunks would need the statistics of all tokens before any gradient: the logits of every chunk
    computed twice (a fourth product) or kept (what chunks are there to avoid). Chunks are large where ranks are
    connected, so the calls are few and the product would cost more.
    """
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if chunk is None:
        chunk = chunk_rows(hidden.device.type, weight.shape[0] if shard is None else shard.largest)
    return _LinearCrossEntropy.apply(hidden, weight, labels, chunk, shard, z_loss, torch.is_grad_enabled())


def chunk_rows(device: str, vocab: int) -> int:
    """How many tokens are computed at a time on a type of device, of a vocabulary or the largest shard of it."""
    return max(256, CHUNK_LOGITS.get(device, 2**21) // max(1, vocab))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk: int,
        shard: VocabShard | None,
        z_loss: float,
        training: bool,
    ) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        factors = wide if _multiplies_wide(hidden) else hidden.dtype
        vocab = weight.shape[0]
        # Ignored rows become zeros: they then add nothing to the weight's gradient, whatever stood in them.
        clean = hidden.masked_fill((labels == IGNORE)[:, None], 0)
        matrix = weight.to(factors)
        need_hidden, need_weight = (training and need for need in ctx.needs_input_grad[:2])
        d_hidden = torch.empty_like(clean) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        # Kept from chunk to chunk: fresh memory costs the CPU as much as the softmax.
        buffer = _buffer(min(chunk, len(clean)), vocab, factors, hidden.device)
        for x, label, d_x in _chunks(chunk, clean, labels, d_hidden):
            x, logits = x.to(factors), buffer[: len(x), :vocab]
            torch.mm(x, matrix.t(), out=logits)
            total += _losses(buffer[: len(x)], logits, label, shard, z_loss, need_hidden or need_weight).sum()
            # From here on `logits` holds their gradient.
            if d_x is not None and d_x.dtype == factors:
                torch.mm(logits, matrix, out=d_x)
            elif d_x is not None:
                d_x.copy_(logits @ matrix)
            if d_weight is not None:
                _add_product(d_weight, logits.t(), x)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        if d_weight is not None:
            # Into the narrow dtype at once: a GPU then needs no second float32 matrix.
            d_weight = torch.mul(d_weight, gradient, out=torch.empty_like(d_weight, dtype=ctx.weight_dtype))
        return None if d_hidden is None else d_hidden * gradient, d_weight, None, None, None, None, None


def _losses(
    buffer: Tensor, logits: Tensor, labels: Tensor, shard: VocabShard | None, z_loss: float, slope: bool
) -> Tensor:
    """Losses of the rows; `logits` become their gradient, if `slope` asks for it. `buffer` is their memory."""
    if not use_triton("cross_entropy", logits):
        return softmax_rows(logits, labels, shard, z_loss)
    from armillary.kernels import cross_entropy_triton as kernels

    if shard is None:
        return kernels.softmax_rows(buffer, logits.shape[1], labels, z_loss, slope)
    return kernels.sharded_softmax_rows(buffer, logits.shape[1], labels, shard, z_loss, slope)


def _buffer(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for the logits of a chunk. On a GPU its rows are padded, so that each begins where wide loads may."""
    width = -(-vocab // 64) * 64 if device.type == "cuda" else vocab
    return torch.empty(rows, width, dtype=dtype, device=device)


def _multiplies_wide(factor: Tensor) -> bool:
    """Whether products of this dtype are computed in float32 all the same.

    A CPU without bfloat16 instructions only emulates them, up to 80 times slower than float32; a float32 copy of the
    weight is the price.
    """
    if factor.device.type != "cpu" or factor.dtype.itemsize >= 4:
        return False
    return factor.dtype != torch.bfloat16 or not _cpu_has_bfloat16()


@functools.cache
def _cpu_has_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`; total may be wider than the factors.

    A wider total gets its product from float32 sums; where the device cannot return those (all but CUDA), the product
    is rounded once to the factors' dtype before it is added, in float32.
    """
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    wide_product = _returns_float32(left)
    rows = max(1, BLOCK_PRODUCT.get(left.device.type, 2**19) // max(1, total.shape[1]))
    for part, factor in zip(total.split(rows), left.split(rows), strict=True):
        part.add_(torch.mm(factor, right, out_dtype=total.dtype) if wide_product else factor @ right)


def _returns_float32(factor: Tensor) -> bool:
    """Whether torch.mm gives the float32 sums of narrow products as they are: `out_dtype`, which CUDA alone has."""
    return factor.is_cuda and torch.version.hip is None


def _chunks(size: int, rows: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Rows of all tensors, `size` at a time; None stays None."""
    for start in range(0, len(rows), size):
        yield tuple(None if tensor is None else tensor[start : start + size] for tensor in (rows, *others))
