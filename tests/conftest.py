"""Fixtures shared by all tests."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import world as ranks

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture(scope="session")
def world() -> Callable[..., list[Any]]:
    """`world(fn, num_ranks, *args)`: see tests/world.py."""
    return ranks.run


@pytest.fixture(scope="session")
def rank_failure() -> type[AssertionError]:
    return ranks.RankFailure
