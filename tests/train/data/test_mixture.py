"""Mixtures keep their weights, after any number of sequences."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.train.data.mixture import MOST_PARTS, mix, whole_parts


@given(weights=st.lists(st.integers(1, 60), min_size=1, max_size=9))
def test_after_any_number_of_sequences_each_source_has_had_its_share(weights: list[int]) -> None:
    mixture, total = mix(weights), sum(weights)
    period = len(mixture.sources)
    assert total % period == 0
    had = [0] * len(weights)
    for n in range(2 * period + 3):
        source, place = mixture.place(n)
        assert place == had[source]
        had[source] += 1
        for count, weight in zip(had, weights, strict=True):
            assert abs(count - Fraction(weight * (n + 1), total)) < 1


@given(weights=st.lists(st.floats(1e-3, 1e3, allow_nan=False), min_size=1, max_size=6))
def test_any_weights_are_kept_over_long_runs(weights: list[float]) -> None:
    parts = whole_parts(weights)
    assert sum(parts) <= MOST_PARTS
    for part, weight in zip(parts, weights, strict=True):
        assert part >= 1
        assert abs(part / sum(parts) - weight / sum(weights)) <= len(weights) / MOST_PARTS


@pytest.mark.parametrize(
    ("weights", "parts"),
    [([0.7, 0.2, 0.1], [7, 2, 1]), ([1.0], [1]), ([3.0, 6.0], [1, 2]), ([1e-9, 1.0], [1, MOST_PARTS - 1])],
)
def test_weights_are_the_decimals_they_are_written_as(weights: list[float], parts: list[int]) -> None:
    assert whole_parts(weights) == parts
