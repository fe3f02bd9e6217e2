"""Every token is on one rank, shares are rectangular, and work is balanced as the placements promise."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.kernels.attention.mask import Mask, visible
from armillary.kernels.attention.places import Places
from armillary.parallel.context.layout import PLACEMENTS, Layout, default_placement, keys_seen, lay_out, quotas


def packed(seq: int, rng: np.random.Generator, mean: float) -> tuple[np.ndarray, np.ndarray]:
    """Positions and documents of one row of documents with lognormal lengths."""
    positions, documents, start, number = np.zeros(seq, np.int64), np.zeros(seq, np.int64), 0, 0
    while start < seq:
        length = int(min(seq - start, max(1, rng.lognormal(np.log(mean) - 0.5, 1.0))))
        positions[start : start + length] = np.arange(length)
        documents[start : start + length] = number
        start, number = start + length, number + 1
    return positions, documents


def work_per_rank(layout: Layout) -> np.ndarray:
    """Pairs of query and key that each rank's queries see, causal."""
    work = keys_seen(Mask(), layout.positions, layout.documents)
    return np.array([layout.take(work, rank).sum() for rank in range(len(layout.tokens))])


@st.composite
def batches(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    seq, batch = draw(st.sampled_from([0, 1, 2, 7, 33, 64, 131])), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    rows = [packed(seq, rng, draw(st.sampled_from([2.0, 9.0, 500.0]))) for _ in range(batch)]
    return np.stack([p for p, _ in rows]), np.stack([d for _, d in rows])


@settings(deadline=None, max_examples=150)
@given(batches(), st.integers(1, 9), st.sampled_from(PLACEMENTS), st.booleans())
def test_each_token_is_on_one_rank(batch, num_ranks, placement, uneven):
    positions, documents = batch
    speeds = [1.0 + rank for rank in range(num_ranks)] if uneven and placement in ("chunks", "contiguous") else None
    layout = lay_out(positions, documents, num_ranks, placement, speeds=speeds)
    held = np.concatenate(layout.tokens, axis=1)
    assert (np.sort(held, axis=1) == np.arange(positions.shape[1])).all()
    assert all((np.diff(index, axis=1) > 0).all() for index in layout.tokens)
    if speeds is None:
        assert max(layout.counts) - min(layout.counts) <= 1
    else:
        assert layout.counts == tuple(quotas(positions.shape[1], num_ranks, speeds))
    tensor = torch.arange(2 * positions.size).view(*positions.shape, 2)
    for rank, index in enumerate(layout.tokens):
        taken = torch.stack([row[torch.from_numpy(places)] for row, places in zip(tensor, index, strict=True)])
        assert torch.equal(layout.take(tensor, rank), taken)
    for rank, places in enumerate(layout.shards()):
        assert (places.positions().numpy() == layout.take(positions, rank)).all()
        assert (places.documents().numpy() == layout.take(documents, rank)).all()


@settings(deadline=None, max_examples=60)
@given(
    batches(),
    st.sampled_from(
        [Mask(), Mask(causal=False), Mask(window=5), Mask(causal=False, window=4), Mask(window=4, sinks=2)]
    ),
)
def test_work_is_what_the_mask_shows(batch, mask):
    positions, documents = (torch.from_numpy(array) for array in batch)
    same = documents[:, :, None] == documents[:, None, :]
    shown = (same & visible(mask, positions[:, :, None], positions[:, None, :])).sum(-1)
    assert (keys_seen(mask, *batch) == shown.numpy()).all()


def test_blocks_and_strides_cost_about_what_they_show():
    positions = torch.arange(96)
    for mask in (Mask(window=8, block=4), Mask(window=8, block=4, sinks=4, stride=3)):
        shown = visible(mask, positions[:, None], positions[None, :]).sum(-1)
        work = keys_seen(mask, positions.numpy()[None], np.zeros((1, 96), np.int64))[0]
        assert abs(work - shown.numpy()).max() <= (0 if not mask.stride else 6)


@pytest.mark.parametrize(
    ("placement", "num_ranks", "low", "high"),
    [
        ("contiguous", 8, 2.0, 3.0),
        ("zigzag", 8, 1.5, 2.2),
        ("document_zigzag", 8, 1.0, 1.005),
        ("striped", 8, 1.0, 1.005),
        ("chunks", 8, 1.0, 1.05),
        ("chunks", 64, 1.0, 1.05),
        ("document_zigzag", 64, 1.0, 1.02),
    ],
)
def test_balance_of_packs(placement, num_ranks, low, high):
    """Max over mean work, 8,192 tokens a rank, documents of about 2,000 tokens: the spec's table, section 3."""
    ratios = []
    for seed in range(5):
        positions, documents = packed(8192 * num_ranks, np.random.default_rng(seed), 2048)
        work = work_per_rank(lay_out(positions[None], documents[None], num_ranks, placement))
        ratios.append(work.max() / work.mean())
    assert low <= np.mean(ratios) <= high, ratios


def test_zigzag_balances_one_document():
    work = work_per_rank(lay_out(np.arange(8001)[None], None, 7, "zigzag"))
    assert work.max() / work.mean() < 1.002


def test_chunks_heed_speeds():
    positions, documents = packed(65536, np.random.default_rng(0), 2048)
    speeds = np.array([1, 1, 1, 1, 2, 2, 0.5, 0.5])
    work = work_per_rank(lay_out(positions[None], documents[None], 8, "chunks", speeds=speeds)) / speeds
    assert work.max() / work.mean() < 1.05


def test_short_documents_go_round_the_ranks():
    documents = np.repeat(np.arange(8), 3)[None]
    layout = lay_out(np.tile(np.arange(3), 8)[None], documents, 8, "document_zigzag")
    assert layout.counts == (3,) * 8


def test_the_default_follows_the_mask():
    one, packs = np.zeros((2, 6), np.int64), np.array([[0, 0, 0, 1, 1, 1]])
    assert default_placement(Mask(window=4), packs) == "contiguous"
    assert default_placement(Mask(window=4, sinks=2), one) == "zigzag"
    assert default_placement(Mask(), one) == "zigzag"
    assert default_placement(Mask(), packs) == "chunks"
    assert default_placement(Mask(), np.zeros((1, 0))) == "zigzag"


def test_a_shard_knows_the_others():
    layout = lay_out(np.arange(10)[None], None, 3, "striped")
    places = layout.places(1)
    assert isinstance(places, Places)
    assert places.positions().tolist() == [[1, 4, 7]]
    assert (places.rank, [shard.seq for shard in places.shards]) == (1, [4, 3, 3])
    assert places.derived("x", object) is places.shards[1].derived("x", object)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "spiral"}, "no placement 'spiral'; there are contiguous, zigzag"),
        ({"placement": "zigzag", "speeds": [1, 2]}, "zigzag shares out evenly"),
        ({"placement": "chunks", "speeds": [1, 2, 3]}, "3 speeds for 2 ranks"),
        ({"placement": "chunks", "speeds": [1, 0]}, "one positive speed"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lay_out(np.arange(6)[None], None, 2, **options)
