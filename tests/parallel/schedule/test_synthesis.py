"""Schedules made to measure: never slower than a known one, within memory, above the bound, the same every time."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_schedules import run_dry

from armillary.parallel.schedule.actions import place_stages
from armillary.parallel.schedule.bound import lower_bound
from armillary.parallel.schedule.check import check
from armillary.parallel.schedule.greedy import Policy, Problem, dispatch
from armillary.parallel.schedule.search import evaluate, improve
from armillary.parallel.schedule.simulator import Costs, even_costs, simulate
from armillary.parallel.schedule.synthesis import stock_of_cut, synthesise

SLACK = 1 + 1e-9


@st.composite
def problems(draw, most_ranks=4, most=8):
    num_ranks, per_rank = draw(st.integers(1, most_ranks)), draw(st.integers(1, 3))
    stage_ranks = place_stages(num_ranks, per_rank, draw(st.sampled_from(["loop", "v"])))
    num_stages = len(stage_ranks)

    def drawn(low=0.1, high=3.0):
        return tuple(draw(st.lists(st.floats(low, high), min_size=num_stages, max_size=num_stages)))

    full = drawn() if draw(st.booleans()) else ()
    costs = Costs(drawn(), drawn(), drawn(), full, drawn(0, 1)[1:], drawn())
    rooms = draw(st.lists(st.floats(1, 3 * num_ranks), min_size=num_ranks, max_size=num_ranks))
    needed = [sum(h for h, r in zip(costs.held(), stage_ranks, strict=True) if r == i) for i in range(num_ranks)]
    limits = [n * room for n, room in zip(needed, rooms, strict=True)] if draw(st.booleans()) else None
    return stage_ranks, draw(st.integers(1, most)), costs, limits


@settings(max_examples=60, deadline=None)
@given(problems())
def test_never_slower_than_a_known_schedule_nor_faster_than_the_bound(problem):
    stage_ranks, num, costs, limits = problem
    made = synthesise(stage_ranks, num, costs, limits, effort=40)
    check(made.schedule)
    assert made.simulation.makespan == simulate(made.schedule, costs).makespan
    for stock in stock_of_cut(stage_ranks, num):
        run = simulate(stock, costs)
        assert run.makespan >= lower_bound(stage_ranks, num, costs) / SLACK
        if limits is None or all(p <= limit for p, limit in zip(run.peaks, limits, strict=True)):
            # The bound within a memory holds for what keeps to it.
            assert run.makespan >= made.bound / SLACK
            assert made.simulation.makespan <= run.makespan * SLACK
    assert made.ratio >= 1 / SLACK
    assert made.bound >= lower_bound(stage_ranks, num, costs)
    if limits is not None:
        assert all(p <= limit * SLACK for p, limit in zip(made.simulation.peaks, limits, strict=True))


@settings(max_examples=25, deadline=None)
@given(problems(3, 5))
def test_torchs_runtime_takes_what_is_made(problem):
    run_dry(synthesise(*problem, effort=20).schedule)


@settings(max_examples=40, deadline=None)
@given(problems(), st.integers(1, 3), st.integers(0, 3), st.floats(-2, 2), st.floats(0, 1), st.sampled_from([0, 3, 99]))
def test_rules_never_run_into_a_deadlock_nor_over_a_limit(problem, under_way, owed, later, patience, split):
    stage_ranks, num, costs, limits = problem
    num_ranks, num_stages = max(stage_ranks) + 1, len(stage_ranks)
    numbers = Problem(stage_ranks, num, costs, limits or (math.inf,) * num_ranks, min(num, split))
    shift = tuple(later * (-1) ** stage for stage in range(num_stages))
    policy = Policy((under_way,) * num_stages, (owed,) * num_ranks, shift, shift[::-1], patience)
    score, orders = dispatch(numbers, policy)
    assert all(numbers.fits(rank, order) for rank, order in enumerate(orders))
    for order in orders:
        open_ones = [0] * num_stages
        for kind, stage, _ in order:
            open_ones[stage] += (kind == 0) - (kind == 1)
            assert open_ones[stage] <= under_way
    run = evaluate(numbers, orders)
    # The order that rules make, followed without their waiting, is at least as fast.
    assert run is not None
    assert run[0][0] <= score[0] * SLACK
    better, moved = improve(numbers, orders, 40)
    assert better[0] <= run[0][0] + 1e-9
    again = evaluate(numbers, moved)
    assert again is not None
    assert again[0] == better
    assert all(numbers.fits(rank, order) for rank, order in enumerate(moved))
    assert sorted(map(sorted, moved)) == sorted(map(sorted, orders))


def test_with_twice_the_memory_of_1f1b_zb1p_is_beaten_up_to_the_bound():
    made = synthesise(place_stages(8, 1), 16, even_costs(8, 1, 1.3, 0.7), [16.0] * 8)
    assert made.ratio == pytest.approx(1)
    assert made.simulation.bubble == pytest.approx(7 / (3 * 16 + 7))
    assert made.best_stock / made.simulation.makespan > 1.07


def test_few_micro_batches_in_a_v_beat_zbv():
    made = synthesise(place_stages(4, 2, "v"), 4, even_costs(8), [8.0] * 4)
    assert made.ratio == pytest.approx(1)
    assert made.best_stock / made.simulation.makespan > 1.1


def test_a_cheap_full_backward_is_split_only_where_that_helps():
    stage_ranks = place_stages(4, 1)
    made = synthesise(stage_ranks, 16, replace(even_costs(4), backward=(1.5,) * 4))
    kinds = [leaf.kind for leaf in made.schedule.leaves()]
    assert kinds.count("B") > kinds.count("I") > 0
    assert made.simulation.makespan < made.best_stock
    # So cheap that it never helps: then 1F1B cannot be beaten by much.
    whole = synthesise(stage_ranks, 16, replace(even_costs(4), backward=(1.0,) * 4))
    assert not whole.schedule.splits_backward
    assert whole.simulation.makespan <= 2 * 19 * SLACK


def test_without_splits():
    made = synthesise(place_stages(4, 2, "v"), 6, even_costs(8, 1, 1.3, 0.7, 0.2), split=False)
    assert not made.schedule.splits_backward
    assert made.best_stock == math.inf
    run_dry(made.schedule)


def test_equal_inputs_give_equal_schedules():
    def make(scale):
        costs = Costs(*(tuple(scale * s for s in row) for row in ((1, 2, 1, 1), (2, 2, 1, 1), (1, 1, 1, 3))))
        return synthesise(place_stages(4, 1), 6, costs, effort=60).schedule

    assert make(1.0).orders == make(1.0).orders
    # Units do not matter either; a power of two is exact.
    assert make(1.0).orders == make(1 / 1024).orders


def test_the_bound_of_small_cases():
    assert lower_bound(place_stages(1, 1), 5, even_costs(1, 1, 2, 3)) == 30
    # One micro-batch: there, back, and the first stage's weights.
    assert lower_bound(place_stages(3, 1), 1, even_costs(3, 1, 2, 3, 0.5)) == 3 + 6 + 3 + 4 * 0.5
    # The last stage is busy from 1 on; its last gradient still goes to stage 0, which has its weights to do.
    assert lower_bound((0, 1), 4, Costs((1.0, 3.0), (1.0, 3.0), (4.0, 0.0))) == 1 + 4 * 6 + 1 + 4
    # Memory for two forwards: rank 0 has its first backward after 2 p - 1 forwards and backwards.
    assert lower_bound(place_stages(4, 1), 8, even_costs(4), [2.0] * 4) == 7 + 24 - 2


def test_too_little_memory_is_refused():
    with pytest.raises(ValueError, match=r"pipeline rank 1 may hold 1.5 bytes .* takes 2; raise optim.micro_batches"):
        synthesise(place_stages(2, 2), 4, even_costs(4), [2.0, 1.5])
