"""Ranks that do not fit the plan, or cannot meet, are told so before anything is computed."""

import os
import socket

import pytest
import torch

from armillary.parallel.mesh import joined_ranks, make_ranks
from armillary.parallel.plan import Plan


def make_wrong(rank: int) -> str:
    with pytest.raises(ValueError) as caught:
        make_ranks(Plan(dp=3), torch.device("cpu"))
    return str(caught.value)


def test_another_number_of_ranks_is_refused(world):
    expected = (
        "plan (dp=3) needs 3 ranks, but 2 were started; start 3, or set the degrees so that their product is 2 "
        '(for example --plan "dp=2")'
    )
    assert world(make_wrong, 2) == [expected] * 2


def test_one_process_alone_is_a_run_of_one_rank():
    with joined_ranks(Plan()) as ranks:
        assert (ranks.rank, ranks.num_ranks, ranks.data.size()) == (0, 1, 1)
    assert not torch.distributed.is_initialized()


def test_one_process_alone_cannot_be_two():
    with pytest.raises(ValueError, match="needs 2 ranks, but 1 were started"), joined_ranks(Plan(dp=2)):
        pass
    assert not torch.distributed.is_initialized()


def test_a_port_in_use_is_named(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in settings.items():
            monkeypatch.setitem(os.environ, name, str(value))
        expected = rf"cannot meet at 127\.0\.0\.1:{port} .*if the port is in use, set MASTER_PORT to a free one"
        with pytest.raises(ValueError, match=expected), joined_ranks(Plan()):
            pass
