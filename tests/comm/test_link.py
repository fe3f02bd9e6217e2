"""The measured link: one number for all ranks, and what it says."""

import pytest
import torch

from armillary.comm.ledger import Ledger
from armillary.comm.link import Link, measure_link, short


def measured(rank: int) -> tuple[float, float, bool]:
    link = measure_link(torch.distributed.group.WORLD, Ledger(), torch.device("cpu"))
    return link.rate, link.latency, link.own_links


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_all_ranks_measure_the_same(world, num_ranks):
    found = world(measured, num_ranks)
    assert len(set(found)) == 1
    rate, latency, own_links = found[0]
    assert 1e6 < rate < 1e12
    assert 0 < latency < 1
    assert num_ranks > 2 or not own_links, "two ranks have one link between them"


def test_what_a_link_takes_and_says():
    link = Link(2e6, 0.01, own_links=True)
    assert link.seconds(4e6) == pytest.approx(2.01)
    assert link.seconds(0) == 0
    assert str(link) == "a link for each pair, 2 MB/s, 10 ms latency"
    assert short(1234567, "B") == "1.23 MB"
