"""The measured link: one number for all ranks, and what it says."""

import time

import pytest
import torch

from armillary.comm import link as measured_link
from armillary.comm.ledger import Ledger
from armillary.comm.link import Link, measure_link, with_unit


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


class Planted:
    """An exchange that takes so long."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def wait(self) -> None:
        time.sleep(self.seconds)


def measured_on(rank: int, own_links: bool) -> tuple[float, float, bool]:
    """On links of 10 MB/s and 10 ms, one for each pair or one port a rank."""

    def start(sends, receives, **_):
        sizes = [send.tensor.numel() for send in sends]
        assert [receive.shape for receive in receives] == [(size,) for size in sizes]
        return Planted(0.01 + (max(sizes) if own_links else sum(sizes)) / 1e7)

    measured_link.start = start
    return measured(rank)


@pytest.mark.parametrize("own_links", [False, True])
def test_the_link_that_there_is_is_found(world, own_links):
    for rate, latency, own in world(measured_on, 3, own_links):
        assert rate == pytest.approx(1e7, rel=0.4)
        assert 0.01 <= latency < 0.05
        assert own == own_links


def test_what_a_link_takes_and_says():
    link = Link(2e6, 0.01, own_links=True)
    assert link.seconds(4e6) == pytest.approx(2.01)
    assert link.seconds(0) == 0
    assert str(link) == "a link for each pair, 2 MB/s, 10 ms latency"
    assert with_unit(1234567, "B") == "1.23 MB"
