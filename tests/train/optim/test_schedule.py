"""The learning rate's shape, for any schedule, and what `[optim]` refuses."""

import itertools
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from armillary.train.optim.schedule import OptimConfig, learning_rate_ratio


@st.composite
def configs(draw: st.DrawFn) -> OptimConfig:
    config = OptimConfig(
        steps=draw(st.integers(1, 300)),
        warmup_steps=draw(st.integers(0, 300)),
        schedule=draw(st.sampled_from(["wsd", "cosine", "constant"])),
        decay_fraction=draw(st.floats(0, 1)),
        final_ratio=draw(st.floats(0, 1)),
    )
    assume(not list(config.problems()))
    return config


def ratios(config: OptimConfig) -> list[float]:
    return [learning_rate_ratio(config, step) for step in range(config.steps + 1)]


@settings(deadline=None)
@given(configs())
def test_the_warm_up_rises_and_the_rest_never_does(config: OptimConfig) -> None:
    values = ratios(config)
    rise, rest = values[: config.warmup_steps + 1], values[config.warmup_steps :]
    assert all(a < b for a, b in itertools.pairwise(rise[:-1]))
    assert all(a >= b - 1e-15 for a, b in itertools.pairwise(rest))


@settings(deadline=None)
@given(configs())
def test_every_step_is_within_bounds_and_does_something(config: OptimConfig) -> None:
    assert all(0 < value <= 1 for value in ratios(config)[:-1])
    assert all(value >= config.final_ratio - 1e-15 for value in ratios(config)[config.warmup_steps :])


@settings(deadline=None)
@given(configs())
def test_it_is_continuous(config: OptimConfig) -> None:
    values = ratios(config)
    fall = (1 - config.final_ratio) * {
        "wsd": 1 / (config.decay_steps + 1),
        "cosine": math.pi / 2 / max(config.steps - config.warmup_steps, 1),
        "constant": 0.0,
    }[config.schedule]
    if config.steps == config.warmup_steps:
        values.pop()  # nothing is left for a decay
    largest = max(fall, 1 / (config.warmup_steps + 1) if config.warmup_steps else 0.0)
    assert all(abs(a - b) <= largest + 1e-12 for a, b in itertools.pairwise(values))


@settings(deadline=None)
@given(configs(), st.integers(0, 1000))
def test_it_ends_at_the_final_ratio_and_stays(config: OptimConfig, beyond: int) -> None:
    end = 1.0 if config.schedule == "constant" else config.final_ratio
    assert learning_rate_ratio(config, config.steps + beyond) == pytest.approx(end, abs=1e-12)


def test_warmup_stable_decay_step_by_step() -> None:
    config = OptimConfig(steps=10, warmup_steps=3, decay_fraction=0.4, final_ratio=0.0)
    assert ratios(config) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.0])


def test_cosine_step_by_step() -> None:
    config = OptimConfig(steps=5, warmup_steps=1, schedule="cosine", final_ratio=0.1)
    half = 0.45 * (1 - math.sqrt(0.5))
    assert ratios(config) == pytest.approx([0.5, 1, 1 - half, 0.55, 0.1 + half, 0.1])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (OptimConfig(steps=10, warmup_steps=9), ("9 steps", "decay 2", "optim.steps = 10", "optim.decay_fraction")),
        (OptimConfig(steps=10, warmup_steps=11, schedule="cosine"), ("11 steps", "optim.warmup_steps, or raise")),
        (OptimConfig(steps=1, decay_fraction=1.0, warmup_steps=1), ("decay 1", "optim.steps = 1;")),
    ],
)
def test_a_schedule_longer_than_the_run_is_refused(config: OptimConfig, words: tuple[str, ...]) -> None:
    [(key, sentence)] = config.problems()
    assert key == "warmup_steps"
    assert all(word in sentence for word in words), sentence


def test_a_schedule_that_just_fits_is_accepted() -> None:
    assert not list(OptimConfig(steps=10, warmup_steps=8).problems())
    assert not list(OptimConfig(steps=10, warmup_steps=10, schedule="constant").problems())
