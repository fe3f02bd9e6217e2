"""The benchmark of pipeline schedules: its cases, its rows, and what the recorded ones claim."""

import json
from pathlib import Path

import pytest

from armillary.launch import cli
from armillary.launch.bench.pipeline import CUTS, NUM_LAYERS, PROFILES, cut_costs, measure, read_ranks
from armillary.launch.bench.pipeline_picture import draw
from armillary.parallel.schedule.actions import place_stages

RECORDED = Path(__file__).parents[3] / "docs/benchmarks/pipeline-simulated.json"
KNOWN = {"1f1b (1 stage)", "gpipe (1 stage)", "zb1p (1 stage)", "interleaved (2 looped)", "zb1p (2 looped)"}
KNOWN |= {"zbv (2 as V)", "dualpipev (2 as V)"}


def holds(rows):
    for row in rows:
        assert row["simulated"]
        assert row["stock"].keys() >= KNOWN
        assert row["ratio"] >= 1 - 1e-4
        for made in row["synthesised"].values():
            assert made["over_best_stock"] is None or made["over_best_stock"] >= 1 - 1e-4
            assert made["to_bound"] >= 1
        assert row["seconds"] == min(made["makespan"] for made in row["synthesised"].values())


def test_rows_of_a_small_run(capsys):
    result = measure([2], effort=5)
    assert len(result["rows"]) == 3 * len(PROFILES) * 2
    holds(result["rows"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(result["rows"]) + 1
    assert "best known" in printed[0]


def test_recorded_rows():
    recorded = json.loads(RECORDED.read_text(), parse_constant=pytest.fail)
    assert {row["ranks"] for row in recorded["rows"]} == {4, 8, 16}
    assert len(recorded["rows"]) == 3 * 3 * len(PROFILES) * 2
    holds(recorded["rows"])


@pytest.mark.parametrize("cut", CUTS)
def test_costs_of_a_cut_are_those_of_the_model(cut):
    stage_ranks = place_stages(8, *CUTS[cut])
    for profile in PROFILES.values():
        costs, held = cut_costs(profile, 8, stage_ranks)
        speeds = [profile.slow if rank == 4 else 1.0 for rank in stage_ranks]
        work = sum(seconds * speed for seconds, speed in zip(costs.forward, speeds, strict=True))
        assert work == pytest.approx(8 * (1 + (profile.embedding + profile.head) / NUM_LAYERS))
        assert sum(held) == pytest.approx(8)


def test_picture(tmp_path):
    file = tmp_path / "schedules.png"
    draw(file)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_ranks_that_make_no_sense_are_refused(monkeypatch, capsys):
    assert read_ranks("4, 8,16") == [4, 8, 16]
    for text in ("0", "33", "4;8", ""):
        with pytest.raises(ValueError, match=r"--ranks .*: give numbers from 1 to 32"):
            read_ranks(text)
    monkeypatch.setattr("sys.argv", ["armillary", "bench", "pipeline", "--ranks", "x"])
    assert cli.run() == 2
    assert "Traceback" not in capsys.readouterr().err
