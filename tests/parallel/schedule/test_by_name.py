"""Schedules by name: complete, free of deadlocks, torch's own orders, and taken by torch's runtime."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_schedules import run_dry, torch_actions, torch_order

from armillary.parallel.schedule.actions import Action, place_stages
from armillary.parallel.schedule.by_name import SCHEDULES, schedule_named, shape_of
from armillary.parallel.schedule.check import check
from armillary.parallel.schedule.stock import KNOWN


@st.composite
def plans(draw, names=tuple(KNOWN), most_ranks=8, most=20):
    name = draw(st.sampled_from(names))
    per_rank = draw(st.integers(1, 4)) if KNOWN[name].other_stages else KNOWN[name].stages
    return name, draw(st.integers(1, most_ranks)), draw(st.integers(1, most)), per_rank


@settings(max_examples=200, deadline=None)
@given(plans())
def test_every_number_of_micro_batches_has_a_schedule(plan):
    name, num_ranks, num, per_rank = plan
    schedule = schedule_named(name, num_ranks, num, per_rank)
    assert schedule.num_stages == num_ranks * per_rank
    assert sum(len(leaf.kind.replace("B", "IW")) for leaf in schedule.leaves()) == 3 * num * schedule.num_stages


@settings(max_examples=150, deadline=None)
@given(plans(("interleaved", "zb1p", "zbv", "dualpipev")))
def test_the_order_is_torchs_where_torch_has_one(plan):
    name, num_ranks, num, per_rank = plan
    if (order := torch_order(name, num_ranks, num, per_rank)) is not None:
        assert schedule_named(name, num_ranks, num, per_rank).lines() == order


@settings(max_examples=80, deadline=None)
@given(plans(most_ranks=5, most=12))
def test_torchs_runtime_takes_every_schedule(plan):
    name, num_ranks, num, per_rank = plan
    schedule = schedule_named(name, num_ranks, num, per_rank)
    run_dry(schedule)
    run_dry(schedule.flat())


def test_1f1b_on_two_ranks():
    assert schedule_named("1f1b", 2, 3).lines() == {
        0: ["0F0", "0F1", "0B0", "0F2", "0B1", "0B2"],
        1: ["1F0", "1B0", "1F1", "1B1", "1F2", "1B2"],
    }


def test_gpipe_with_two_stages_a_rank():
    assert schedule_named("gpipe", 1, 2, 2).lines()[0] == ["0F0", "0F1", "1F0", "1F1", "1B0", "1B1", "0B0", "0B1"]


def test_an_action_is_written_as_torch_writes_it():
    schedule = schedule_named("dualpipev", 2, 4)
    assert schedule.overlaps
    assert not schedule.flat().overlaps
    assert {rank: list(map(str, order)) for rank, order in torch_actions(schedule).items()} == schedule.lines()
    assert "(0F3;3B1)OVERLAP_F_B" in schedule.lines()[0]


def test_which_schedules_split_the_backward():
    split = {name for name in SCHEDULES if schedule_named(name, 4, 8).splits_backward}
    assert split == {"zb1p", "zbv", "dualpipev", "synthesised"}


def test_a_v_turns_round_at_both_ends():
    assert place_stages(3, 3, "v") == (0, 1, 2, 2, 1, 0, 0, 1, 2)
    assert schedule_named("zbv", 3, 5).stages_of(1) == (1, 4)


def test_numbers_that_a_schedule_does_not_have_are_refused():
    for arguments, message in (
        (("2f2b", 2, 2), r'plan.schedule = "2f2b" is not a schedule; there are: gpipe, 1f1b'),
        (("1f1b", 2, 2, 2), r'exactly 1 stage a rank, not plan.stages_per_rank = 2; .* "interleaved" for more'),
        (("zbv", 2, 2, 3), r"exactly 2 stages a rank"),
        (("interleaved", 2, 2, -1), r"plan.stages_per_rank = -1 must be at least 1"),
        (("gpipe", 2, 0), r"optim.micro_batches of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            schedule_named(*arguments)


def test_a_synthesised_schedule_is_a_v():
    schedule = schedule_named("synthesised", 3, 5, 2)
    assert shape_of("synthesised") == "v"
    assert schedule.stage_ranks == (0, 1, 2, 2, 1, 0)
    assert schedule.name == "synthesised"
    assert schedule_named("synthesised", 3, 5).stage_ranks == (0, 1, 2)
    assert not schedule_named("synthesised", 3, 5, split=False).splits_backward


def broken(edit):
    schedule = schedule_named("zb1p", 2, 3)
    orders = [list(order) for order in schedule.orders]
    edit(orders)
    return replace(schedule, orders=tuple(map(tuple, orders)))


def swap(order, first, second):
    i, j = (next(k for k, a in enumerate(order) if str(a) == text) for text in (first, second))
    order[i], order[j] = order[j], order[i]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda o: o[0].pop(), "W of stage 0 for 2 of 3"),
        (lambda o: o[1].append(Action(1, "W", 2)), "each is computed once, in order"),
        (lambda o: swap(o[0], "0F0", "0F1"), "each is computed once, in order"),
        (lambda o: swap(o[1], "1F0", "1I0"), "wait for each other for ever at 0I0, 1I0"),
        (lambda o: swap(o[0], "0F2", "0I1"), ""),
        (lambda o: o[0].append(o[1].pop()), "which is not its stage's"),
        (lambda o: o.append([]), "every rank holds a stage"),
        (lambda o: o[1].insert(0, Action(-1, "OVERLAP_F_B", -1, (o[1].pop(0), o[1].pop(0)))), "for ever"),
    ],
)
def test_check_finds_what_is_wrong(edit, message):
    if not message:
        check(broken(edit))
        return
    with pytest.raises(ValueError, match=message):
        check(broken(edit))
