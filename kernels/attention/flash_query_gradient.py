"""FlashAttention-2, backward for the queries: one program sums the gradient of one block of queries for one head.

The backward pass is two kernels, this one and the keys'. Each sum is one program's, in a fixed order: no atomics, no
buffer to zero, the same bits every time. That costs the scores twice, seven products in place of five; in return
nothing is read back and written again. With p = exp(score - lse), which needs no second pass (Dao 2023, algorithm 2):

    dv = p^T d_out;  d_score = p * (d_out v^T - delta);  dq = scale d_score k;  dk = scale d_score^T q

A row's lse and delta come as offsets, -lse / scale and -delta, of the products q k^T and d_out v^T.
"""

import triton
import triton.language as tl

from armillary.kernels.attention.flash_forward import LOG2E
from armillary.kernels.attention.flash_ranges import (
    far_apart,
    is_far,
    key_ranges,
    load_block,
    load_run,
    load_tile,
    masked_keys,
    middle,
    num_masked_keys,
    seen_keys,
)


@triton.jit
def add_keys(
    dq, row_block, shown, k_run, v_run, k_seq, v_seq, low, high, scale, run, limits, rule: tl.constexpr,
    MASKED: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """Adds what keys low .. high of a run give to the gradient of a block of queries, but for the scale.

    With MASKED, a row sees the keys between its two bounds `shown`, and those outside its window that `is_far`.
    """
    q, d_out, score_offset, slope_offset = row_block
    columns, dims = tl.arange(0, BN), tl.arange(0, D)
    for start in tl.range(low, high, BN, disable_licm=True):
        here = start + columns < high
        k_tile = k_run + tl.cast(start, tl.int64) * k_seq + (columns[None, :] * k_seq + dims[:, None])
        v_tile = v_run + tl.cast(start, tl.int64) * v_seq + (columns[None, :] * v_seq + dims[:, None])
        k = load_tile(k_tile, here[None, :], dims[:, None] < HEAD_DIM, MASKED, HEAD_DIM != D)
        v = load_tile(v_tile, here[None, :], dims[:, None] < HEAD_DIM, MASKED, HEAD_DIM != D)
        p = tl.math.exp2(tl.dot(q, k, input_precision="ieee") * scale + score_offset[:, None])
        if MASKED:
            number = (start + columns)[None, :]
            ok = number >= shown[0][:, None]
            if rule.far:
                ok = ok | is_far(run[0] + number * run[1], limits, rule)
            p = tl.where(ok & (number < shown[1][:, None]), p, 0.0)
        d_scores = p * (tl.dot(d_out, v, input_precision="ieee") + slope_offset[:, None])
        dq = tl.dot(d_scores.to(k.dtype), tl.trans(k), dq, input_precision="ieee")
    return dq


@triton.jit
def store_gradient(tile, gradient, inside, ADD: tl.constexpr):
    """Writes a gradient in the buffer's dtype, or adds it to what is there."""
    if ADD:
        gradient = gradient + tl.load(tile, mask=inside, other=0.0).to(tl.float32)
    tl.store(tile, gradient.to(tile.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["reach", "sinks", "stride", "shift", "first_head", "offset_batch", "offset_head"])
def query_gradient_kernel(
    d_out_ptr, q_ptr, k_ptr, v_ptr, score_offset_ptr, slope_offset_ptr, dq_ptr, blocks_ptr, runs_ptr,
    d_out_batch, d_out_seq, d_out_head, q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head,
    offset_batch, offset_head, dq_batch, dq_seq, dq_head,
    scale, group, reach, sinks, stride, shift, first_head,
    rule: tl.constexpr, ADD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """Grid (blocks of queries, heads). `scale` is the softmax's."""
    row, first, count, position, step, first_run, last_run = load_block(blocks_ptr, tl.program_id(0))
    head = tl.program_id(1)
    kv_head = head // group
    limits = (reach, sinks, stride, shift * (first_head + kv_head))

    rows, dims = tl.arange(0, BM), tl.arange(0, D)
    valid = rows < count
    inside = valid[:, None] & (dims[None, :] < HEAD_DIM)
    q_tile = q_ptr + row * q_batch + head * q_head + first * q_seq + (rows[:, None] * q_seq + dims[None, :])
    d_out_tile = d_out_ptr + row * d_out_batch + head * d_out_head + first * d_out_seq
    offsets = row * offset_batch + head * offset_head + first + rows
    row_block = (
        tl.load(q_tile, mask=inside, other=0.0),
        tl.load(d_out_tile + (rows[:, None] * d_out_seq + dims[None, :]), mask=inside, other=0.0),
        tl.load(score_offset_ptr + offsets, mask=valid, other=0.0) * (scale * LOG2E),
        tl.load(slope_offset_ptr + offsets, mask=valid, other=0.0),
    )

    dq = tl.zeros([BM, D], tl.float32)
    for number in tl.range(first_run, last_run, disable_licm=True):
        start, run = load_run(runs_ptr, number)
        begin, full_begin, full_end, end = key_ranges(position, position + (count - 1) * step, run, limits, rule)
        from_middle, to_middle = middle(begin, full_begin, full_end, BN)
        k_run = k_ptr + row * k_batch + kv_head * k_head + start * k_seq
        v_run = v_ptr + row * v_batch + kv_head * v_head + start * v_seq
        for part in tl.range(0, num_masked_keys(begin, run, limits, rule), disable_licm=True):
            low, high = masked_keys(part, begin, from_middle, to_middle, end, run, limits, rule)
            shown = far_apart(seen_keys(position + rows * step, run, limits, rule), part, high, rule)
            dq = add_keys(
                dq, row_block, shown, k_run, v_run, k_seq, v_seq, low, high, scale * LOG2E, run, limits, rule,
                True, BN, D, HEAD_DIM
            )  # fmt: skip
        dq = add_keys(
            dq, row_block, (0, 0), k_run, v_run, k_seq, v_seq, from_middle, to_middle, scale * LOG2E, run, limits, rule,
            False, BN, D, HEAD_DIM
        )  # fmt: skip

    dq_tile = dq_ptr + row * dq_batch + head * dq_head + first * dq_seq + (rows[:, None] * dq_seq + dims[None, :])
    store_gradient(dq_tile, dq * scale, inside, ADD)
