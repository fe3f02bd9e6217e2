"""A pipeline gives what one process gives, with every schedule."""

import pytest
from pipeline_cases import Case, on_rank, problems

CASES = [
    (2, Case("gpipe", num_parts=3)),
    (2, Case("gpipe", num_parts=1, stages_per_rank=2, tied=False)),
    (2, Case("1f1b", num_parts=5, tied=False)),
    (2, Case("1f1b", num_parts=1, qkv_bias=True, recompute="full")),
    (2, Case("interleaved", num_parts=4, recompute="selective")),
    (2, Case("interleaved", num_parts=3, stages_per_rank=3, qk_norm=True, tied=False)),
    (2, Case("zb1p", num_parts=5, qkv_bias=True)),
    (2, Case("zb1p", num_parts=2, tied=False, recompute="selective", packed=False)),
    (2, Case("zbv", num_parts=5, qk_norm=True, recompute="full")),
    (2, Case("zbv", num_parts=1, tied=False)),
    (2, Case("dualpipev", num_parts=6, tied=False, qk_norm=True, recompute="full")),
    (2, Case("dualpipev", num_parts=5, overlap=True, recompute="selective")),
    (4, Case("1f1b", num_parts=3, recompute="selective")),
    (4, Case("zbv", num_parts=6, qkv_bias=True, tied=False, recompute="selective")),
    (4, Case("dualpipev", num_parts=9, recompute="full")),
    (4, Case("dualpipev", num_parts=9, overlap=True, tied=False, qk_norm=True, qkv_bias=True)),
]


@pytest.mark.parametrize(("num_ranks", "case"), CASES, ids=str)
def test_same_as_one_process(world, num_ranks, case):
    found = world(on_rank, num_ranks, case)
    wrong = problems(found, case, case.plan(num_ranks).num_stages)
    assert not wrong, "\n".join(wrong)
