"""Triton's form of softmax_rows: one program a row reads its logits twice and overwrites them with their gradient.

Float32 arithmetic throughout; the logits' dtype appears only at loads and stores. Source of the one-pass maximum and
sum: Milakov and Gimelshein 2018.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from armillary.kernels.softmax_rows import IGNORE, find_labels, finish
from armillary.kernels.specimen import Specimen
from armillary.kernels.vocab_shard import VocabShard

_IGNORE = tl.constexpr(IGNORE)

MAX_BLOCK = 8192
"""Logits of one step. Sixteen for each of 16 warps' threads: few rows are then under way at once, and what a row's
first reading fetched is still in the L2 cache when the second comes."""


def softmax_rows(buffer: Tensor, vocab: int, labels: Tensor, z_loss: float, slope: bool) -> Tensor:
    """Losses (rows,) float32 of the logits in the first `vocab` columns of `buffer` (rows, width), contiguous.

    labels (rows,) int64, any stride. With `slope` the logits become their losses' gradient and the columns beyond them
    zero; without, nothing is written. Rows of IGNORE get loss 0 and gradient 0 whatever stands in them, a label
    beyond the vocabulary NaN. See softmax_rows.softmax_rows for the loss.
    """
    losses = torch.empty(len(buffer), dtype=torch.float32, device=buffer.device)
    if len(buffer):
        block, warps = _block(vocab)
        with torch.cuda.device_of(buffer):
            _rows_kernel[(len(buffer),)](
                buffer, labels, losses, vocab, buffer.shape[1], labels.stride(0), z_loss,
                BLOCK=block, SLOPE=slope, num_warps=warps,
            )  # fmt: skip
    return losses


def sharded_softmax_rows(
    buffer: Tensor, vocab: int, labels: Tensor, shard: VocabShard, z_loss: float, slope: bool
) -> Tensor:
    """softmax_rows where `buffer` holds this rank's columns of the logits; losses are those of the whole vocabulary.

    `vocab` and the buffer's width may be 0.
    """
    num_rows = len(buffer)
    held, _ = find_labels(labels, vocab, shard)
    largest, total, target = torch.empty(3, num_rows, dtype=torch.float32, device=buffer.device)
    block, warps = _block(vocab)
    grid = (num_rows,)
    with torch.cuda.device_of(buffer):
        if num_rows:
            _statistics_kernel[grid](
                buffer, labels, largest, total, target, vocab, buffer.shape[1], labels.stride(0), shard.first,
                BLOCK=block, num_warps=warps,
            )  # fmt: skip
        overall = shard.reduce_max(largest.clone())
        # A shard without a finite logit has largest -inf and total 0; whole rows of -inf become NaN, as in torch.
        total = torch.where(largest == -torch.inf, 0, total * (largest - overall).exp())
        sums = torch.stack((total, torch.where(held, target - overall, 0), held.float()))
        losses, scale = finish(sums, overall, labels, shard, z_loss)
        if slope and num_rows and vocab:
            _slope_kernel[grid](
                buffer, labels, overall, scale, vocab, buffer.shape[1], labels.stride(0), shard.first,
                BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return losses


def _block(vocab: int) -> tuple[int, int]:
    """Logits of one step, and warps of a program."""
    block = min(MAX_BLOCK, max(128, triton.next_power_of_2(vocab)))
    return block, min(16, max(1, block // 512))


@triton.jit
def _statistics(
    row: tl.tensor,
    vocab: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Largest logit of the row, and the sum of exp(logit - largest); 0 where all logits are -inf."""
    largest = float("-inf")
    total = 0.0
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        # `width` is a multiple of 16 where `vocab` may not be: this mask leaves the loads wide.
        logits = tl.load(row + columns, mask=columns < width, other=0.0).to(tl.float32)
        logits = tl.where(columns < vocab, logits, float("-inf"))
        previous = largest
        largest = tl.maximum(previous, tl.max(logits, 0))
        # -inf - -inf would be NaN.
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        total = total * tl.exp(previous - shift) + tl.sum(tl.exp(logits - shift), 0)
    return largest, total


@triton.jit
def _write_slope(
    row: tl.tensor,
    vocab: tl.tensor,
    width: tl.tensor,
    largest: tl.tensor,
    scale: tl.tensor,
    target: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Logits -> exp(logit - largest) * scale, less one in the column `target`; zeros beyond `vocab`.

    From the row's end to its beginning: the end was read last, and is the likeliest to be in the cache.
    """
    num_steps = tl.cdiv(width, BLOCK)
    for step in range(num_steps):
        columns = (num_steps - 1 - step) * BLOCK + tl.arange(0, BLOCK)
        logits = tl.load(row + columns, mask=columns < width, other=0.0).to(tl.float32)
        slope = tl.exp(logits - largest) * scale - tl.where(columns == target, 1.0, 0.0)
        slope = tl.where(columns < vocab, slope, 0.0)
        tl.store(row + columns, slope.to(row.dtype.element_ty), mask=columns < width)


@triton.jit
def _write_zeros(
    row: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        tl.store(row + columns, tl.zeros((BLOCK,), row.dtype.element_ty), mask=columns < width)


@triton.jit
def _rows_kernel(
    logits_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    losses_ptr: tl.tensor,
    vocab: tl.tensor,
    width: tl.tensor,
    label_stride: tl.tensor,
    z_loss: tl.tensor,
    BLOCK: tl.constexpr,
    SLOPE: tl.constexpr,
) -> None:
    index = tl.program_id(0).to(tl.int64)
    row = logits_ptr + index * width
    label = tl.load(labels_ptr + index * label_stride)
    if label == _IGNORE:
        tl.store(losses_ptr + index, 0.0)
        if SLOPE:
            _write_zeros(row, width, BLOCK)
    else:
        held = (label >= 0) & (label < vocab)
        # Read before the reductions: no thread can then have overwritten it.
        target = tl.load(row + label, mask=held, other=float("nan")).to(tl.float32)
        largest, total = _statistics(row, vocab, width, BLOCK)
        # The target less the largest first: large logits then lose no digits of the loss.
        loss = tl.log(total) - (target - largest)
        lse = largest + tl.log(total)
        tl.store(losses_ptr + index, loss + z_loss * lse * lse)
        if SLOPE:
            scale = (1.0 + 2.0 * z_loss * lse) / total
            _write_slope(row, vocab, width, largest, scale, label, BLOCK)


@triton.jit
def _statistics_kernel(
    logits_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    largest_ptr: tl.tensor,
    total_ptr: tl.tensor,
    target_ptr: tl.tensor,
    vocab: tl.tensor,
    width: tl.tensor,
    label_stride: tl.tensor,
    first: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    index = tl.program_id(0).to(tl.int64)
    row = logits_ptr + index * width
    label = tl.load(labels_ptr + index * label_stride)
    if label == _IGNORE:
        tl.store(largest_ptr + index, 0.0)
        tl.store(total_ptr + index, 0.0)
        tl.store(target_ptr + index, 0.0)
    else:
        local = label - first
        held = (local >= 0) & (local < vocab)
        target = tl.load(row + local, mask=held, other=0.0).to(tl.float32)
        largest, total = _statistics(row, vocab, width, BLOCK)
        tl.store(largest_ptr + index, largest)
        tl.store(total_ptr + index, total)
        tl.store(target_ptr + index, target)


@triton.jit
def _slope_kernel(
    logits_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    largest_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    vocab: tl.tensor,
    width: tl.tensor,
    label_stride: tl.tensor,
    first: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    index = tl.program_id(0).to(tl.int64)
    row = logits_ptr + index * width
    label = tl.load(labels_ptr + index * label_stride)
    if label == _IGNORE:
        _write_zeros(row, width, BLOCK)
    else:
        # A label of another rank's matches no column, or one beyond `vocab`, where zero is written.
        _write_slope(
            row, vocab, width, tl.load(largest_ptr + index), tl.load(scale_ptr + index), label - first, BLOCK
        )  # fmt: skip


def specimens() -> list[Specimen]:
    """Every block that vocabularies up to 262144 lead to, in both dtypes, with ragged vocabularies."""
    found = []
    for dtype in ("bf16", "fp32"):
        for vocab in (100, 1000, 4095, 262143):
            block, warps = _block(vocab)
            pointers = {"logits_ptr": f"*{dtype}", "labels_ptr": "*i64"}
            sizes = {"vocab": "i32", "width": "i32", "label_stride": "i32"}
            floats = ("losses_ptr", "largest_ptr", "total_ptr", "target_ptr", "scale_ptr")
            signature = pointers | dict.fromkeys(floats, "*fp32") | sizes | {"first": "i32", "z_loss": "fp32"}
            kernels = [
                ("rows", _rows_kernel, {"SLOPE": True}),
                ("rows_loss_only", _rows_kernel, {"SLOPE": False}),
                ("statistics", _statistics_kernel, {}),
                ("slope", _slope_kernel, {}),
            ]
            for name, kernel, constants in kernels:
                found.append(
                    Specimen(
                        f"cross_entropy_{name}_{dtype}_{block}",
                        kernel,
                        {arg: signature[arg] for arg in kernel.arg_names if arg in signature},
                        {"BLOCK": block} | constants,
                        num_warps=warps,
                        unaligned=frozenset({"vocab", "label_stride", "first"} & set(kernel.arg_names)),
                    )
                )
    return found
