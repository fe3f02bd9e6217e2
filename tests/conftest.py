"""Fixtures shared by all tests."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import world as ranks
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# The suite starts hundreds of processes, each of which would compile the whole tree anew, for a quarter of a second.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
if not torch.cuda.is_available():
    # Triton reads it when it is first imported, its own library included: see tests/interpreter.py.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# How long an example takes says nothing on a machine that is busy.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a slow test come first: what is left at the end is short, and no worker waits long for another."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def world() -> Callable[..., list[Any]]:
    """`world(fn, num_ranks, *args)`: see tests/world.py."""
    return ranks.run


@pytest.fixture(scope="session")
def rank_failure() -> type[AssertionError]:
    return ranks.RankFailure
