"""Plots: what is drawn of hard data, and that it stays small."""

import re

import pytest

from armillary.launch.plots import charts_of


@pytest.mark.filterwarnings("error")
def test_tokens_that_a_logarithm_cannot_show() -> None:
    rows = [{"step": step, "train/loss": 2.0, "train/tokens": 0} for step in range(5)]
    assert [title for title, _, _ in charts_of(rows, [])] == ["Loss"]


def test_a_long_run_makes_small_plots_that_keep_its_spikes() -> None:
    rows = [{"step": s, "train/loss": 2.0, "train/grad_norm": 900.0 if s == 7777 else 1.0} for s in range(20_000)]
    charts = {title: svg for title, _, svg in charts_of(rows, [])}
    assert sum(map(len, charts.values())) < 90_000
    (raw,) = re.findall(r'd="M ([^"]*)"[^>]*stroke-opacity', charts["Gradient norm"])
    heights = [float(y) for y in re.findall(r"[\d.]+ ([\d.]+)", raw)]
    assert min(heights) < sorted(heights)[1] - 50


def test_marks_and_legend_name_what_happened() -> None:
    rows = [{"step": step, "train/loss": 2.0 / step, "eval/loss": 3.0} for step in range(1, 5)]
    events = [{"step": 2, "event": "resume"}, {"step": 3, "event": "skip"}, {"step": 3, "event": "checkpoint"}]
    ((_, legend, svg),) = charts_of(rows, events)
    assert re.findall(r'class="key (\w+)">([\w-]+)<', legend) == [
        ("train", "training"),
        ("held", "held-out"),
        ("warn", "trouble"),
        ("muted", "resumed"),
    ]
    assert svg.count("stroke-dasharray") == 2
    assert charts_of(rows, events[2:])[0][2].count("stroke-dasharray") == 0
