"""A pipeline gives what one process gives, with every schedule."""

import pytest
from pipeline_cases import Case, on_rank, problems

CASES = [
    (2, Case("gpipe", num_parts=3)),
    (2, Case("1f1b", num_parts=5, tied=False)),
]


@pytest.mark.parametrize(("num_ranks", "case"), CASES, ids=str)
def test_same_as_one_process(world, num_ranks, case):
    found = world(on_rank, num_ranks, case)
    wrong = problems(found, case, case.plan(num_ranks).num_stages)
    assert not wrong, "\n".join(wrong)
