"""The guard's decisions, checked against its policy told in another way, and its words."""

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.train.guard import Guard, GuardConfig, Verdict

GOOD, BAD = (2.5, 1.0), (math.nan, 1.0)


def judge_all(guard: Guard, steps: str) -> list[str]:
    """Verdicts on steps written as a text: '.' is sound, 'x' is not."""
    return [guard.judge(*(BAD if step == "x" else GOOD)) for step in steps]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_any_number_that_is_not_finite_stops_the_update(value: float, where: int) -> None:
    numbers = list(GOOD)
    numbers[where] = value
    verdict = Guard(GuardConfig()).judge(*numbers)
    assert verdict == "skip"
    assert not verdict.accepted


def test_sound_steps_are_accepted_however_large() -> None:
    verdict = Guard(GuardConfig()).judge(1e30, 0.0)
    assert verdict == "accept"
    assert verdict.accepted


def test_skip_then_roll_back_then_stop() -> None:
    guard = Guard(GuardConfig(max_skips=2, max_rollbacks=1))
    assert judge_all(guard, ".xx.xxx.xx.xxx") == [
        *("accept", "skip", "skip", "accept", "skip", "skip", "roll_back"),
        *("accept", "skip", "skip", "accept", "skip", "skip", "stop"),
    ]


def test_no_budget_at_all_stops_at_once() -> None:
    assert judge_all(Guard(GuardConfig(max_skips=0, max_rollbacks=0)), "x") == ["stop"]


@given(st.text("x.", max_size=80), st.integers(0, 4), st.integers(0, 4))
def test_the_policy_as_counted_from_runs_of_bad_steps(steps: str, max_skips: int, max_rollbacks: int) -> None:
    expected: list[str] = []
    rollbacks = 0
    for step, run in itertools.groupby(steps):
        for count, _ in enumerate(run, start=1):
            if step == ".":
                expected.append("accept")
            elif count % (max_skips + 1):
                expected.append("skip")
            else:
                rollbacks += 1
                expected.append("roll_back" if rollbacks <= max_rollbacks else "stop")
    assert judge_all(Guard(GuardConfig(max_skips=max_skips, max_rollbacks=max_rollbacks)), steps) == expected


@given(st.text("x.", max_size=40), st.text("x.", max_size=40))
def test_a_restored_guard_goes_on_as_the_first_would(before: str, after: str) -> None:
    guard, resumed = Guard(GuardConfig()), Guard(GuardConfig())
    judge_all(guard, before)
    resumed.restore(json.loads(json.dumps(guard.state())))
    assert judge_all(resumed, after) == judge_all(guard, after)


def test_loading_the_checkpoint_of_a_roll_back_does_not_refill_the_budget() -> None:
    guard = Guard(GuardConfig(max_skips=0, max_rollbacks=2))
    checkpoint = guard.state()
    verdicts = []
    for _ in range(3):
        verdicts += judge_all(guard, ".x")
        guard.restore(checkpoint)
    assert verdicts == ["accept", "roll_back", "accept", "roll_back", "accept", "stop"]


@pytest.mark.parametrize(
    "state",
    [{}, {"skips": 1}, {"skips": 1, "rollbacks": -1}, {"skips": 1.5, "rollbacks": 0}, {"skips": True, "rollbacks": 0}],
)
def test_a_damaged_state_is_refused(state: dict) -> None:
    guard = Guard(GuardConfig())
    with pytest.raises(ValueError, match=r"guard: the saved state is .* resume from another checkpoint"):
        guard.restore(state)
    assert guard.state() == {"skips": 0, "rollbacks": 0}


def test_each_verdict_says_what_happened_and_what_to_change() -> None:
    guard = Guard(GuardConfig(max_skips=1, max_rollbacks=1))
    said = [guard.explain(guard.judge(*numbers), 7, *numbers) for numbers in (GOOD, BAD, BAD, BAD, BAD)]
    assert said[0] == "step 7: loss 2.5, gradient norm 1: accepted"
    assert all(text.startswith("step 7: loss nan, gradient norm 1: not finite") for text in said[1:])
    assert "skip 1 of 1 in a row" in said[1]
    assert "optim.learning_rate" in said[1]
    assert "newest checkpoint is loaded" in said[2]
    assert "roll-back 1 of 1" in said[2]
    assert "the run stops" in said[4]
    assert "guard.max_rollbacks" in said[4]


def test_verdicts_are_their_words() -> None:
    assert json.dumps(list(Verdict)) == '["accept", "skip", "roll_back", "stop"]'
