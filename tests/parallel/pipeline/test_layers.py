"""Layers into stages: against every split there is, with uneven ranks, memory limits and what a user may write."""

import math
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.parallel.pipeline.layers import LayerCosts, given_layers, split_layers
from armillary.parallel.schedule.actions import place_stages

COST = st.integers(1, 9).map(float)


def slowest(counts, work, stage_ranks, speeds):
    return max(c / s for c, s in zip(work.of_ranks(counts, stage_ranks), speeds, strict=True))


def every_split(num_layers, num_stages):
    for bars in combinations(range(1, num_layers), num_stages - 1):
        yield tuple(end - start for start, end in pairwise((0, *bars, num_layers)))


@st.composite
def problems(draw, alike=False):
    num_ranks = draw(st.integers(1, 3))
    per_rank = draw(st.integers(1, 3 if alike else 2))
    num_layers = num_ranks * per_rank + draw(st.integers(0, 5))
    layers = [draw(COST)] * num_layers if alike else draw(st.lists(COST, min_size=num_layers, max_size=num_layers))
    work = LayerCosts(tuple(layers), draw(st.floats(0, 5)), draw(st.floats(0, 20)))
    speeds = draw(st.lists(st.sampled_from([0.5, 0.6, 1.0, 2.0]), min_size=num_ranks, max_size=num_ranks))
    return work, place_stages(num_ranks, per_rank, draw(st.sampled_from(["loop", "v"]))), speeds


@settings(max_examples=120, deadline=None)
@given(st.booleans().flatmap(problems))
def test_no_split_is_better(problem):
    work, stage_ranks, speeds = problem
    counts = split_layers(work, stage_ranks, speeds)
    assert sum(counts) == len(work.layers)
    assert min(counts) >= 1
    found = slowest(counts, work, stage_ranks, speeds)
    best = min(slowest(c, work, stage_ranks, speeds) for c in every_split(len(work.layers), len(stage_ranks)))
    assert math.isclose(found, best, rel_tol=1e-9)


@settings(max_examples=120, deadline=None)
@given(st.booleans().flatmap(problems), st.floats(1, 30))
def test_memory_limits_are_kept_or_refused(problem, limit):
    work, stage_ranks, speeds = problem
    memory = LayerCosts(work.layers[::-1], 2.0, 3.0)
    limits = [limit] * len(speeds)

    def fits(counts):
        return max(memory.of_ranks(counts, stage_ranks)) <= limit

    allowed = [c for c in every_split(len(work.layers), len(stage_ranks)) if fits(c)]
    if not allowed:
        with pytest.raises(ValueError, match=r"fits their memory"):
            split_layers(work, stage_ranks, speeds, memory, limits)
        return
    counts = split_layers(work, stage_ranks, speeds, memory, limits)
    assert fits(counts)
    best = min(slowest(c, work, stage_ranks, speeds) for c in allowed)
    assert math.isclose(slowest(counts, work, stage_ranks, speeds), best, rel_tol=1e-9)


def test_even_ranks_and_layers_have_an_even_split():
    assert split_layers(LayerCosts((1.0,) * 8), place_stages(4, 1)) == (2, 2, 2, 2)
    assert sorted(split_layers(LayerCosts((1.0,) * 10), place_stages(4, 1))) == [2, 2, 3, 3]
    assert split_layers(LayerCosts((1.0,) * 16), place_stages(4, 2, "v")) == (2,) * 8


def test_a_heavy_head_and_a_slow_rank_get_fewer_layers():
    # Of splits as even as each other, the one with the fewer layers in front: early stages hold more micro-batches.
    assert split_layers(LayerCosts((1.0,) * 16, 0.0, 3.0), place_stages(4, 1)) == (4, 5, 5, 2)
    assert split_layers(LayerCosts((1.0,) * 18), place_stages(4, 1), [1, 0.6, 1, 1]) == (5, 3, 5, 5)


def test_long_models_with_unlike_layers_and_many_stages():
    work = LayerCosts(tuple(1.0 + (i % 3 == 0) for i in range(96)), 2.0, 12.0)
    stage_ranks = place_stages(8, 4)
    counts = split_layers(work, stage_ranks)
    costs = work.of_ranks(counts, stage_ranks)
    # Nothing can be below the mean, and layers cost at most 2.
    assert max(costs) <= sum(costs) / 8 + 2


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ValueError, match=r"8 pipeline stages .* model.num_layers = 6 .* at most 6"):
        split_layers(LayerCosts((1.0,) * 6), place_stages(4, 2))
    with pytest.raises(ValueError, match=r"2 pipeline stages .* model.num_layers = 1"):
        split_layers(LayerCosts((1.0,)), place_stages(2, 1))
    assert split_layers(LayerCosts((1.0,)), place_stages(1, 1)) == (1,)


def test_speeds_are_positive():
    for speeds in ([1.0, 0.0], [1.0], [1.0, math.inf]):
        with pytest.raises(ValueError, match=r"2 positive numbers"):
            split_layers(LayerCosts((1.0,) * 4), place_stages(2, 1), speeds)


def test_layers_that_a_user_gives():
    assert given_layers([0, 3, 5, 0], 8, 4) == (0, 3, 5, 0)
    for counts, message in (
        ([4, 4], "2 numbers; give one for each of the 4"),
        ([2, 2, 2, 3], "adds up to 9; it must be model.num_layers = 8"),
        ([2, 0, 4, 2], "only the first and the last"),
        ([-1, 4, 4, 1], "only the first and the last"),
    ):
        with pytest.raises(ValueError, match=message):
            given_layers(counts, 8, 4)
