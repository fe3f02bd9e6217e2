"""The simulator against closed forms, published figures, and small cases by hand."""

from dataclasses import replace
from math import isclose

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.parallel.schedule.actions import Action, Schedule
from armillary.parallel.schedule.by_name import schedule_named
from armillary.parallel.schedule.simulator import Costs, even_costs, simulate

SECONDS = st.floats(0.1, 3)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 20), SECONDS, SECONDS, SECONDS)
def test_bubble_of_1f1b_and_gpipe(num_ranks, num, forward, back, weight):
    costs = even_costs(num_ranks, forward, back, weight)
    for name in ("1f1b", "gpipe"):
        run = simulate(schedule_named(name, num_ranks, num), costs)
        assert isclose(run.bubble, (num_ranks - 1) / (num + num_ranks - 1), abs_tol=1e-9)
        assert isclose(run.makespan, (forward + back + weight) * (num + num_ranks - 1))
    peaks = simulate(schedule_named("1f1b", num_ranks, num), costs).peaks
    assert peaks == tuple(min(num, num_ranks - rank) for rank in range(num_ranks))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), SECONDS, SECONDS)
def test_bubble_of_interleaved(num_ranks, rounds, per_rank, forward, back):
    num = rounds * num_ranks
    costs = even_costs(num_ranks * per_rank, forward, back, back)
    run = simulate(schedule_named("interleaved", num_ranks, num, per_rank), costs)
    assert isclose(run.bubble, (num_ranks - 1) / (per_rank * num + num_ranks - 1), abs_tol=1e-9)


PUBLISHED = {
    # Of 8 ranks and 16 micro-batches, in %: F = I = W; 1, 1.3, 0.7; and the first with hops of a tenth of F.
    ("1f1b", 1): (30.4, 30.4, 34.2),
    ("gpipe", 1): (30.4, 30.4, 31.8),
    ("interleaved", 2): (17.9, 17.9, 22.0),
    ("interleaved", 4): (9.9, 9.9, 19.3),
    ("zb1p", 1): (12.7, 18.9, 17.0),
    ("zb1p", 2): (6.8, 10.4, 12.9),
    ("zbv", 2): (6.8, 8.7, 12.4),
    ("dualpipev", 2): (12.7, 16.7, 19.9),
}


@pytest.mark.parametrize(("name", "per_rank"), PUBLISHED)
def test_bubbles_of_torchs_orders_as_measured_before(name, per_rank):
    schedule = schedule_named(name, 8, 16, per_rank)
    found = []
    for forward, back, weight, hop in ((1, 1, 1, 0), (1, 1.3, 0.7, 0), (1, 1, 1, 0.1)):
        parts = (seconds / per_rank for seconds in (forward, back, weight))
        found.append(round(100 * simulate(schedule, even_costs(8 * per_rank, *parts, hop)).bubble, 1))
    assert tuple(found) == PUBLISHED[name, per_rank]


def two_ranks(*orders):
    def read(text):
        return Action(int(text[0]), text[1], int(text[2]))

    return Schedule("by hand", 2, (0, 1), tuple(tuple(map(read, order.split())) for order in orders))


BY_HAND = two_ranks("0F0 0F1 0I0 0W0 0B1", "1F0 1I0 1F1 1I1 1W0 1W1")
UNEVEN = Costs((1.0, 2.0), (3.0, 4.0), (0.5, 1.5), hops=(0.25,), activations=(10.0, 7.0))


def test_every_span_of_a_small_case():
    run = simulate(BY_HAND, UNEVEN)
    spans = {str(span.action): (span.start, span.end) for spans in run.spans for span in spans}
    assert spans == {
        "0F0": (0, 1),
        "0F1": (1, 2),
        "1F0": (1.25, 3.25),
        "1I0": (3.25, 7.25),
        "1F1": (7.25, 9.25),
        "1I1": (9.25, 13.25),
        "1W0": (13.25, 14.75),
        "1W1": (14.75, 16.25),
        "0I0": (7.5, 10.5),
        "0W0": (10.5, 11),
        "0B1": (13.5, 17),
    }
    assert run.makespan == 17
    assert run.busy == (9, 15)
    assert run.bubble == pytest.approx(1 - 24 / 34)
    assert run.peaks == (20, 14)


def test_a_full_backward_may_cost_other_than_its_parts():
    run = simulate(BY_HAND, replace(UNEVEN, backward=(2.0, 5.0)))
    assert run.spans[0][-1] == (Action(0, "B", 1), 13.5, 15.5)
    assert run.makespan == 16.25


def test_transfers_one_at_a_time_wait_for_each_other():
    schedule = schedule_named("gpipe", 2, 3)
    slow = even_costs(2, hop=5.0)
    together = simulate(schedule, slow)
    in_turn = simulate(schedule, replace(slow, one_at_a_time=True))
    # Forwards arrive at 6, 7, 8; in turn at 6, 11, 16. Backwards begin at 9, or at 17, and two more follow.
    assert [span.start for span in together.spans[1][:3]] == [6, 7, 8]
    assert [span.start for span in in_turn.spans[1][:3]] == [6, 11, 16]
    assert in_turn.makespan > together.makespan


def test_what_an_overlap_hides():
    schedule = schedule_named("dualpipev", 4, 16)
    costs = even_costs(8)
    sequential, half, full = (simulate(schedule, replace(costs, hidden=share)) for share in (0.0, 0.5, 1.0))
    # An overlap begins when the inputs of both parts are there; taken apart, the first need not wait.
    assert simulate(schedule.flat(), costs).makespan == 99
    assert sequential.makespan == 102
    assert full.makespan < half.makespan < sequential.makespan
    pairs = sum(bool(action.parts) for action in schedule.orders[0])
    assert sequential.busy[0] - full.busy[0] == pytest.approx(pairs)


def test_stages_on_one_rank_hand_over_at_once():
    run = simulate(schedule_named("zbv", 1, 2), even_costs(2, hop=100.0))
    assert run.makespan == 12


def test_what_cannot_be_simulated_is_refused():
    with pytest.raises(ValueError, match=r"costs of 3 stages for a schedule of 2"):
        simulate(schedule_named("1f1b", 2, 2), even_costs(3))
    with pytest.raises(ValueError, match=r"by hand: ranks wait for each other for ever"):
        simulate(two_ranks("0F0 0B0 0F1 0B1", "1F1 1F0 1B0 1B1"), even_costs(2))
