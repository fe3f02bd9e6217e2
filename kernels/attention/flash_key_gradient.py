"""FlashAttention-2, backward for keys and values: one program sums the gradients of one block of keys for one key head.

See attention/flash_query_gradient.py for the formulas. Scores are computed with keys as rows, so that probabilities
are at once the left operand of the products that follow. The offsets of the queries then lie across a thread's
registers: the products start from them, and what does not change from turn to turn stays out of registers.
"""

import triton
import triton.language as tl

from armillary.kernels.attention.flash_forward import LOG2E
from armillary.kernels.attention.flash_ranges import (
    load_block,
    load_run,
    load_tile,
    middle,
    query_ranges,
    seeing_queries,
    some_far,
)


@triton.jit
def load_gradient(tile, inside, ADD: tl.constexpr, BN: tl.constexpr, D: tl.constexpr):
    """What a gradient's sum starts from: zero, or what its buffer holds."""
    gradient = tl.zeros([BN, D], tl.float32)
    if ADD:
        gradient = tl.load(tile, mask=inside, other=0.0).to(tl.float32)
    return gradient


@triton.jit
def add_queries(
    gradients, k, v, shown, q_run, d_out_run, score_offset, slope_offset, q_seq, d_out_seq, low, high, scale,
    MASKED: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """Adds what queries low .. high of a run give to the gradients of a block of keys and values, but for the scale.

    With MASKED, a key is seen by the queries between its two bounds `shown`. Of KEYS and VALUES at least one is asked.
    """
    dk, dv = gradients
    rows, dims = tl.arange(0, BM), tl.arange(0, D)
    for start in tl.range(low, high, BM, disable_licm=True):
        here = start + rows < high
        q_tile = q_run + tl.cast(start, tl.int64) * q_seq + (rows[None, :] * q_seq + dims[:, None])
        q = load_tile(q_tile, here[None, :], dims[:, None] < HEAD_DIM, MASKED, HEAD_DIM != D)
        offset = load_tile(score_offset + start + rows, here, here, MASKED, False)
        scores = tl.dot(k, q, tl.broadcast_to(offset[None, :], [BN, BM]), input_precision="ieee")
        p = tl.math.exp2(scores * scale)
        if MASKED:
            number = (start + rows)[None, :]
            p = tl.where((number >= shown[0][:, None]) & (number < shown[1][:, None]), p, 0.0)
        d_out_tile = d_out_run + tl.cast(start, tl.int64) * d_out_seq + (rows[:, None] * d_out_seq + dims[None, :])
        d_out = load_tile(d_out_tile, here[:, None], dims[None, :] < HEAD_DIM, MASKED, HEAD_DIM != D)
        if VALUES:
            dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision="ieee")
        if KEYS:
            offset = load_tile(slope_offset + start + rows, here, here, MASKED, False)
            slopes = tl.dot(v, tl.trans(d_out), tl.broadcast_to(offset[None, :], [BN, BM]), input_precision="ieee")
            dk = tl.dot((p * slopes).to(q.dtype), tl.trans(q), dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["reach", "sinks", "stride", "shift", "first_head", "offset_batch", "offset_head"])
def key_gradient_kernel(
    d_out_ptr, q_ptr, k_ptr, v_ptr, score_offset_ptr, slope_offset_ptr, dk_ptr, dv_ptr, blocks_ptr, runs_ptr,
    d_out_batch, d_out_seq, d_out_head, q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head,
    offset_batch, offset_head, dk_batch, dk_seq, dk_head, dv_batch, dv_seq, dv_head,
    scale, group, reach, sinks, stride, shift, first_head,
    rule: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, ADD_K: tl.constexpr, ADD_V: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """Grid (blocks of keys, key heads), one query head after the other. KEYS and VALUES are the gradients to compute:
    one launch each where a head is too long for both."""
    row, first, count, position, step, first_run, last_run = load_block(blocks_ptr, tl.program_id(0))
    kv_head = tl.program_id(1)
    limits = (reach, sinks, stride, shift * (first_head + kv_head))

    columns, dims = tl.arange(0, BN), tl.arange(0, D)
    last = position + (count - 1) * step
    inside = (columns < count)[:, None] & (dims[None, :] < HEAD_DIM)
    k_block = k_ptr + row * k_batch + kv_head * k_head + first * k_seq
    k = tl.load(k_block + (columns[:, None] * k_seq + dims[None, :]), mask=inside, other=0.0)
    v_block = v_ptr + row * v_batch + kv_head * v_head + first * v_seq
    v = tl.load(v_block + (columns[:, None] * v_seq + dims[None, :]), mask=inside, other=0.0)

    # Read here, before the loop fills the registers, and not where they are written.
    dk_block = dk_ptr + row * dk_batch + kv_head * dk_head + first * dk_seq
    dv_block = dv_ptr + row * dv_batch + kv_head * dv_head + first * dv_seq
    gradients = (
        load_gradient(dk_block + (columns[:, None] * dk_seq + dims[None, :]), inside, ADD_K, BN, D) / scale,
        load_gradient(dv_block + (columns[:, None] * dv_seq + dims[None, :]), inside, ADD_V, BN, D),
    )
    for number in tl.range(first_run, last_run, disable_licm=True):
        start, run = load_run(runs_ptr, number)
        begin, full_begin, full_end, end = query_ranges(position, last, run, limits, rule)
        from_middle, to_middle = middle(begin, full_begin, full_end, BM)
        if rule.far:
            end = tl.where(some_far(position, last, limits, rule), run[2], end)
        for head in tl.range(kv_head * group, kv_head * group + group, disable_licm=True):
            q_run = q_ptr + row * q_batch + head * q_head + start * q_seq
            d_out_run = d_out_ptr + row * d_out_batch + head * d_out_head + start * d_out_seq
            score_run = score_offset_ptr + row * offset_batch + head * offset_head + start
            slope_run = slope_offset_ptr + row * offset_batch + head * offset_head + start
            for edge in tl.range(0, 2, disable_licm=True):
                shown = seeing_queries(position + columns * step, run, limits, rule)
                gradients = add_queries(
                    gradients, k, v, shown, q_run, d_out_run, score_run, slope_run, q_seq, d_out_seq,
                    tl.where(edge == 0, begin, to_middle), tl.where(edge == 0, tl.minimum(from_middle, end), end),
                    scale * LOG2E, True, KEYS, VALUES, BM, BN, D, HEAD_DIM
                )  # fmt: skip
            gradients = add_queries(
                gradients, k, v, (0, 0), q_run, d_out_run, score_run, slope_run, q_seq, d_out_seq,
                from_middle, to_middle, scale * LOG2E, False, KEYS, VALUES, BM, BN, D, HEAD_DIM
            )  # fmt: skip

    dk, dv = gradients
    if KEYS:
        dk_tile = dk_block + (columns[:, None] * dk_seq + dims[None, :])
        tl.store(dk_tile, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    if VALUES:
        dv_tile = dv_block + (columns[:, None] * dv_seq + dims[None, :])
        tl.store(dv_tile, dv.to(dv_ptr.dtype.element_ty), mask=inside)
