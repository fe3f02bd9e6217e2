"""The matrix itself is tested: every planted mistake is noticed by the first case that it concerns."""

import tempfile
from pathlib import Path

import planted_plans
import pytest
import torch

from armillary.parallel.mesh import make_ranks
from armillary.train.proof.matrix import Case, config_of, cost, covering_set, num_ranks
from armillary.train.proof.matrix_case import judge


def concerned(levels: dict[str, set[str]]) -> Case:
    """The cheapest case of the covering set, in float64, that has one of the levels of each feature."""
    cases = [case for case in covering_set() if all(case[name] in some for name, some in levels.items())]
    plain = [case for case in cases if case["precision"] == "float64" and "fsdp" in case["zero"]]
    return min(plain, key=cost)


def outcome(rank: int, case: Case, mistake: str) -> dict[str, object]:
    if mistake:
        getattr(planted_plans, mistake)(rank)
    with tempfile.TemporaryDirectory() as folder:
        return judge(case, make_ranks(config_of(case).plan, torch.device("cpu")), Path(folder))


@pytest.mark.parametrize("mistake", [mistake.__name__ for mistake in planted_plans.MISTAKES])
def test_a_planted_mistake_is_noticed(world, mistake):
    levels = planted_plans.MISTAKES[getattr(planted_plans, mistake)]
    case = concerned(levels)
    found = world(outcome, num_ranks(case), case, mistake)[0]
    print(f"{mistake}: {found['error']:.1e} at {found['worst']}")
    assert found["error"] > 1e-7, f"{mistake} is not seen by {case}"


def test_without_a_mistake_nothing_is_noticed(world):
    """By the same path, so that it is the mistakes that are seen."""
    case = concerned({"pp": {"2", "3"}, "micro-batches": {"3"}})
    assert world(outcome, num_ranks(case), case, "")[0]["ok"]
