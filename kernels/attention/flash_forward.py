"""FlashAttention-2, forward: one program computes the rows of one block of queries for one head.

It goes through the keys of its document once, with a running maximum m, sum l and weighted sum `acc` (Dao 2023,
algorithm 1), in float32. Scores are in base 2, so that one multiply-add and exp2 make a probability. The tables of
blocks and runs are those of `tiles.py`.
"""

import triton
import triton.language as tl

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

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def fold_keys(
    state, q, shown, k_run, v_run, k_seq, v_seq, low, high, scale, run, limits, rule: tl.constexpr,
    MASKED: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """Takes keys low .. high of a run into the running softmax; without MASKED they are whole tiles, seen by all.

    With it, a row sees the keys between its two bounds `shown`, and those outside its window that `is_far`.
    """
    acc, m, total = state
    columns, dims = tl.arange(0, BN), tl.arange(0, D)
    for start in tl.range(low, high, BN, disable_licm=True):
        here = start + columns < high
        # 64 bits: a run may be longer than 2^31 elements.
        k_tile = k_run + tl.cast(start, tl.int64) * k_seq + (columns[None, :] * k_seq + dims[:, None])
        k = load_tile(k_tile, here[None, :], dims[:, None] < HEAD_DIM, MASKED, HEAD_DIM != D)
        scores = tl.dot(q, k, input_precision="ieee")
        if MASKED:
            number = (start + columns)[None, :]
            ok = number >= shown[0][:, None]
            if rule.far:
                ok = ok | is_far(run[0] + number * run[1], limits, rule)
            scores = tl.where(ok & (number < shown[1][:, None]), scores, float("-inf"))
        new_m = tl.maximum(m, tl.max(scores, 1) * scale)
        base = new_m
        if MASKED:
            # While a row has seen nothing its maximum is -inf; any finite number then makes its terms 0, and not NaN.
            base = tl.where(new_m == float("-inf"), 0.0, new_m)
        p = tl.math.exp2(scores * scale - base[:, None])
        decay = tl.math.exp2(m - base)
        total = total * decay + tl.sum(p, 1)
        acc = acc * decay[:, None]
        v_tile = v_run + tl.cast(start, tl.int64) * v_seq + (columns[:, None] * v_seq + dims[None, :])
        v = load_tile(v_tile, here[:, None], dims[None, :] < HEAD_DIM, MASKED, HEAD_DIM != D)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        m = new_m
    return acc, m, total


@triton.jit
def load_partial(out_tile, lse_row, valid, inside):
    """The running softmax of a result over other keys: its log-sum-exp is a maximum whose sum is 1."""
    lse = tl.load(lse_row, mask=valid, other=float("-inf"))
    none = lse == float("-inf")
    out = tl.load(out_tile, mask=inside, other=0.0).to(tl.float32)
    return tl.where(none[:, None], 0.0, out), lse * LOG2E, tl.where(none, 0.0, 1.0)


@triton.jit(do_not_specialize=["reach", "sinks", "stride", "shift", "first_head", "lse_batch", "lse_head"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, blocks_ptr, runs_ptr,
    q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head,
    out_batch, out_seq, out_head, lse_batch, lse_head,
    scale, group, reach, sinks, stride, shift, first_head,
    rule: tl.constexpr, FOLD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """Grid (blocks of queries, heads). `scale` has log2(e) in it; FOLD starts from what out and lse hold."""
    row, first, count, position, step, first_run, last_run = load_block(blocks_ptr, tl.program_id(0))
    head = tl.program_id(1)
    kv_head = head // group
    limits = (reach, sinks, stride, shift * (first_head + kv_head))

    rows, dims = tl.arange(0, BM), tl.arange(0, D)
    valid = rows < count
    inside = valid[:, None] & (dims[None, :] < HEAD_DIM)
    positions = position + rows * step
    q_tile = q_ptr + row * q_batch + head * q_head + first * q_seq + (rows[:, None] * q_seq + dims[None, :])
    q = tl.load(q_tile, mask=inside, other=0.0)
    out_block = out_ptr + row * out_batch + head * out_head + first * out_seq
    out_tile = out_block + (rows[:, None] * out_seq + dims[None, :])
    lse_row = lse_ptr + row * lse_batch + head * lse_head + first + rows
    if FOLD:
        state = load_partial(out_tile, lse_row, valid, inside)
    else:
        state = (tl.zeros([BM, D], tl.float32), tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32))

    for number in tl.range(first_run, last_run, disable_licm=True):
        start, run = load_run(runs_ptr, number)
        begin, full_begin, full_end, end = key_ranges(position, position + (count - 1) * step, run, limits, rule)
        from_middle, to_middle = middle(begin, full_begin, full_end, BN)
        k_run = k_ptr + row * k_batch + kv_head * k_head + start * k_seq
        v_run = v_ptr + row * v_batch + kv_head * v_head + start * v_seq
        for part in tl.range(0, num_masked_keys(begin, run, limits, rule), disable_licm=True):
            low, high = masked_keys(part, begin, from_middle, to_middle, end, run, limits, rule)
            shown = far_apart(seen_keys(positions, run, limits, rule), part, high, rule)
            state = fold_keys(
                state, q, shown, k_run, v_run, k_seq, v_seq, low, high, scale, run, limits, rule,
                True, BN, D, HEAD_DIM
            )  # fmt: skip
        state = fold_keys(
            state, q, (0, 0), k_run, v_run, k_seq, v_seq, from_middle, to_middle, scale, run, limits, rule,
            False, BN, D, HEAD_DIM
        )  # fmt: skip

    acc, m, total = state
    none = total == 0.0
    total = tl.where(none, 1.0, total)
    tl.store(lse_row, tl.where(none, float("-inf"), (m + tl.math.log2(total)) * LN2), mask=valid)
    tl.store(out_tile, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
