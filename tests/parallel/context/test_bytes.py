"""The formula against closed forms that need no table: what the literature says each strategy moves. That the ledger
shows the formula's bytes, test_core.py checks on real ranks."""

import numpy as np
import pytest
import torch

from armillary.kernels.attention.mask import Mask
from armillary.parallel.context.bytes import bytes_sent
from armillary.parallel.context.layout import lay_out

FULL = Mask(causal=False)
SIZES = {"heads": 8, "kv_heads": 2, "head_dim": 16, "dtype": torch.bfloat16}
H, G, D, B, TOKENS = 8, 2, 16, 2, 32


def sent(strategy, backward, num_ranks, placement="contiguous", mask=FULL, documents=None, **options):
    positions = np.arange(TOKENS * num_ranks)[None]
    if documents is not None:
        positions = np.concatenate([np.arange(n) for n in documents])[None]
        documents = np.repeat(np.arange(len(documents)), documents)[None]
    shards = lay_out(positions, documents, num_ranks, placement).shards()
    return bytes_sent(strategy, backward, shards, mask, **(SIZES | options))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_with_everything_needed(num_ranks):
    steps = (num_ranks - 1) * TOKENS
    for name in ("ring", "bidirectional_ring", "all_gather"):
        assert sent(name, False, num_ranks) == [steps * 2 * G * D * B] * num_ranks
        assert sent(name, True, num_ranks) == [steps * 2 * G * D * (B + 4)] * num_ranks
    assert sent("token_ring", False, num_ranks) == [steps * (2 * H * D * B + 4 * H)] * num_ranks
    assert sent("token_ring", True, num_ranks) == [steps * (3 * H * D * B + 8 * H)] * num_ranks


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_ulysses(degree):
    """Heads that divide among the ranks, then key heads that every rank needs one of."""
    wide = {"heads": 8, "kv_heads": 8}
    share = (degree - 1) * TOKENS * 8 // degree
    assert sent("ulysses", False, degree, **wide) == [share * (4 * D * B + 4)] * degree
    assert sent("ulysses", True, degree, **wide) == [share * (7 * D * B + 8)] * degree
    one = {"heads": 8, "kv_heads": 1}
    replicated = (degree - 1) * TOKENS * 2 * D
    queries = share * (2 * D * B + 4)
    assert sent("ulysses", False, degree, **one) == [queries + replicated * B] * degree
    assert sent("ulysses", True, degree, **one) == [share * (3 * D * B + 8) + replicated * (B + 4)] * degree


def test_levels_leave_a_rings_bytes_a_step_and_cut_its_steps():
    inside = sent("ulysses", False, 2)[0]
    assert sent("hybrid", False, 8, level=2) == [inside + 3 * (2 * TOKENS) * 2 * (G // 2) * D * B] * 8


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_zigzag_saves_a_quarter_of_what_goes_direct(num_ranks):
    ratio = sum(sent("token_ring", False, num_ranks, "zigzag", Mask())) / sum(sent("token_ring", False, num_ranks))
    assert ratio == 0.75
    assert sum(sent("all_gather", False, num_ranks, "zigzag", Mask())) == 0.75 * sum(sent("ring", False, num_ranks))


def test_a_zigzag_ring_keeps_at_home_what_nobody_else_sees():
    """The row's last tokens, rank 0's late half; its chunk makes its three hops as half a chunk."""
    hops = np.array(sent("ring", False, 4, "zigzag", Mask())) / (TOKENS * 2 * G * D * B)
    assert hops.tolist() == [2.5, 2.5, 2.5, 3.0]


def test_a_window_costs_its_width():
    halo = sent("all_gather", False, 4, mask=Mask(window=9))
    assert halo == [8 * 2 * G * D * B] * 3 + [0]
    assert sent("all_gather", True, 4, mask=Mask(window=9)) == [8 * 2 * G * D * B] + [8 * 2 * G * D * (B + 4)] * 2 + [
        8 * 2 * G * D * 4
    ]


def test_documents_that_stay_on_their_ranks_cost_nothing():
    for name in ("ring", "bidirectional_ring", "token_ring", "all_gather"):
        for backward in (False, True):
            assert sent(name, backward, 4, mask=Mask(), documents=[10, 22, 32, 32, 16, 16]) == [0] * 4


def test_contiguous_causal_chunks_go_no_further_than_they_are_seen():
    chunk = TOKENS * 2 * G * D * B
    assert sent("ring", False, 4, mask=Mask()) == [chunk * n for n in (1, 2, 3, 0)]
