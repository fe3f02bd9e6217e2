"""The truth of attention against the rule in words, torch's own attention and autograd."""

import math

import torch
import torch.nn.functional as F
from attention_cases import Case, cases
from hypothesis import given, settings
from tile_cases import sees
from torch import Tensor

from armillary.kernels.attention.call import row_dots
from armillary.kernels.attention.reference import backward, forward, reference, seen


def seen_in_words(case: Case) -> Tensor:
    tile = case.tile
    (q_pos, q_doc), (k_pos, k_doc) = (
        (p.positions().tolist(), p.documents().tolist()) for p in (tile.queries, tile.keys)
    )
    shown = torch.zeros(tile.queries.batch, case.heads, tile.queries.seq, tile.keys.seq, dtype=torch.bool)
    for row, head, i, j in torch.cartesian_prod(*(torch.arange(size) for size in shown.shape)).tolist():
        kv_head = tile.first_head + head // (case.heads // case.kv_heads)
        same = q_doc[row][i] == k_doc[row][j]
        shown[row, head, i, j] = same and sees(tile.mask, q_pos[row][i], k_pos[row][j], kv_head)
    return shown


@settings(max_examples=30, deadline=None)
@given(cases(longest=9))
def test_is_torchs_attention_under_the_rule(case: Case) -> None:
    q, k, v = case.tensors()
    shown = seen_in_words(case)
    assert torch.equal(seen(case.tile, case.heads, case.kv_heads, q.device), shown)
    out, lse = reference(q, k, v, case.tile)
    blind = ~shown.any(-1)
    assert torch.equal(lse == -math.inf, blind)
    assert (out.transpose(1, 2)[blind] == 0).all()
    heads = [t.transpose(1, 2).repeat_interleave(case.heads // t.shape[2], 1) for t in (q, k, v)]
    # A key more, of weight 0 but for those who see nothing else, keeps torch's softmax from dividing by 0.
    heads[1:] = [F.pad(t, (0, 0, 0, 1)) for t in heads[1:]]
    truth = F.scaled_dot_product_attention(*heads, torch.cat([shown, blind[..., None]], -1), scale=case.tile.scale)
    torch.testing.assert_close(out.transpose(1, 2), truth, rtol=0, atol=1e-13)
    scores = (heads[0] @ heads[1].mT)[..., :-1] * case.tile.scale
    sums = torch.where(shown, scores.exp(), 0).sum(-1)
    torch.testing.assert_close(lse.exp(), sums, rtol=1e-12, atol=0)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_backward_is_autograds_and_never_nan(case: Case) -> None:
    leaves = [tensor.clone().requires_grad_() for tensor in case.tensors()]
    out, lse = reference(*leaves, case.tile)
    d_out, d_lse = case.like(out, 1), case.like(lse, 2)
    truth = torch.autograd.grad([out, lse], leaves, [d_out, d_lse])
    assert all(gradient.isfinite().all() for gradient in truth)
    delta = row_dots(out.detach(), d_out, lse.detach(), d_lse)
    d_q, d_k, d_v = (torch.full_like(leaf, math.nan, requires_grad=False) for leaf in leaves)
    buffers = (d_q, d_k, d_v)
    q, k, v = (leaf.detach() for leaf in leaves)
    backward(d_out, q, k, v, lse.detach(), delta, case.tile, buffers, (False,) * 3)
    torch.testing.assert_close(buffers, truth, rtol=0, atol=1e-11)
    backward(d_out, q, k, v, lse.detach(), delta, case.tile, buffers, (True,) * 3)
    torch.testing.assert_close(buffers, tuple(2 * t for t in truth), rtol=0, atol=2e-11)


@settings(max_examples=30, deadline=None)
@given(cases())
def test_folding_a_result_into_itself_doubles_the_sum(case: Case) -> None:
    inputs = case.tensors(torch.bfloat16)
    truth_out, truth_lse = reference(*inputs, case.tile)
    out, lse = torch.full_like(truth_out, math.nan), torch.full_like(truth_lse, -math.inf)
    for count in (1, 2):
        forward(*inputs, case.tile, out, lse, True)
        torch.testing.assert_close(out, truth_out, rtol=0, atol=1e-13)
        torch.testing.assert_close(lse, truth_lse + math.log(count), rtol=0, atol=1e-13)
