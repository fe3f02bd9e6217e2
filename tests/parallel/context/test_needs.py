"""The table of who needs which tokens never lacks one, and holds none too many where the mask is a stretch; and the
heads of a rank fall into stretches that a tile can compute."""

import numpy as np
import torch
from attention_cases import grids, masks
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.kernels.attention.mask import Mask, visible
from armillary.kernels.attention.places import Places
from armillary.parallel.context.call import Heads, add, pick, put
from armillary.parallel.context.layout import PLACEMENTS, lay_out
from armillary.parallel.context.needs import needs_of, seeing_queries, seen_keys


def shown(queries: Places, keys: Places, mask: Mask) -> np.ndarray:
    """Which pairs meet in some row and some head: bool (queries, keys)."""
    same = queries.documents()[:, :, None] == keys.documents()[:, None, :]
    positions = queries.positions()[:, :, None], keys.positions()[:, None, :]
    heads = torch.stack([visible(mask, *positions, head).expand(same.shape) & same for head in range(4)])
    return heads.any(0).any(0).numpy()


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 2).flatmap(lambda batch: st.tuples(grids(batch), grids(batch))), masks())
def test_no_need_is_missed(pair, mask):
    queries, keys = pair
    pairs = shown(queries, keys, mask)
    found = seen_keys(queries, keys, mask), seeing_queries(queries, keys, mask)
    for got, want in zip(found, (pairs.any(0), pairs.any(1)), strict=True):
        assert got.dtype == bool
        assert got.shape == want.shape
        assert (got >= want).all()
        if not mask.stride and (queries.runs[:, 4] == 1).all() and (keys.runs[:, 4] == 1).all():
            assert (got == want).all()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40),
    st.integers(1, 5),
    st.sampled_from(PLACEMENTS),
    st.sampled_from([Mask(), Mask(window=5), Mask(window=4, sinks=2), Mask(causal=False)]),
)
def test_the_table_is_that_of_every_pair(seq, num_ranks, placement, mask):
    documents = np.repeat([[0, 1]], [seq // 3, seq - seq // 3], axis=1)
    positions = np.concatenate([np.arange(seq // 3), np.arange(seq - seq // 3)])[None]
    shards = lay_out(positions, documents, num_ranks, placement).shards()
    needs = needs_of(shards, mask)
    for q, queries in enumerate(shards):
        for k, keys in enumerate(shards):
            pairs = shown(queries, keys, mask)
            assert (needs.keys[q][k] >= pairs.any(0)).all()
            assert (needs.queries[q][k] >= pairs.any(1)).all()
            if placement != "striped":
                assert (needs.keys[q][k] == pairs.any(0)).all()
                assert (needs.queries[q][k] == pairs.any(1)).all()
    assert needs_of(shards, mask) is needs


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 9))
def test_heads_are_shared_out_whatever_divides(num_kv, ratio, parts):
    whole = Heads(0, num_kv * ratio, ratio)
    shares = whole.split(parts)
    counts = [share.stop - share.first for share in shares]
    assert sum(counts) == whole.stop
    assert max(counts) - min(counts) <= 1
    for share in shares:
        covered = []
        for segment in share.segments():
            queries, keys = segment.within(share)
            assert keys.stop - keys.start > 0
            assert (queries.stop - queries.start) % (keys.stop - keys.start) == 0
            each = (queries.stop - queries.start) // (keys.stop - keys.start)
            for place, head in enumerate(range(segment.first, segment.stop)):
                covered.append(head)
                assert share.kv_first + keys.start + place // each == head // ratio
        assert covered == list(range(share.first, share.stop))
        middle = share.kv_first + share.num_kv // 2
        halves = share.of_keys(share.kv_first, middle), share.of_keys(middle, share.kv_stop)
        assert [h for half in halves for h in range(half.first, half.stop)] == covered


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_tokens_are_picked_and_put_back(choice):
    held = np.array([a for a, _ in choice])
    wanted = np.array([a and b for a, b in choice])
    tensor = torch.randn(2, int(held.sum()), 3)
    part = pick(tensor, 1, held, wanted)
    assert torch.equal(part, tensor[:, torch.from_numpy(wanted[held])])
    more, other = tensor.clone(), tensor.clone()
    add(more, 1, held, wanted, part.clone())
    put(other, 1, held, wanted, part + 1)
    assert torch.equal(more[:, torch.from_numpy(wanted[held])], 2 * part)
    assert torch.equal(other[:, torch.from_numpy(wanted[held])], part + 1)
    assert torch.equal(more[:, torch.from_numpy(~wanted[held])], tensor[:, torch.from_numpy(~wanted[held])])
