"""A plan beside the same by hand: rows of both sides, bytes from the ledger, and a refusal to time unlike work."""

import json

import numpy as np
import pytest

from armillary.launch import cli
from armillary.launch.bench.compose import rows_of
from armillary.launch.bench.compose_cases import (
    PLANS,
    SIZES,
    Case,
    batches_of,
    cases,
    growth_cases,
    num_ranks,
    tokens_of_step,
)
from armillary.launch.bench.compose_rank import AGREEMENT, compare

CASE = cases("small", ["FSDP x TP"])[0]


def armillary(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["armillary", "bench", "compose", *arguments])
    return cli.run()


def test_four_ranks_beside_the_same_by_hand(tmp_path, monkeypatch, capfd):
    """The ranks themselves hold losses and norms against each other, under tensor ranks, stages and FSDP."""
    file, names = tmp_path / "it.json", "FSDP x TP,FSDP x PP,FSDP x PP zbv,PP x TP"
    order = ("--size", "small", "--plans", names, "--repetitions", "1", "--json", str(file))
    assert armillary(monkeypatch, *order) == 0
    result = json.loads(file.read_text())
    assert [row["side"] for row in result["rows"]] == ["ours", "by hand"] * 4
    for row in result["rows"]:
        assert row["measured"]
        assert row["seconds"] > 0
        assert row["loss_difference"] <= AGREEMENT
        purposes = set(row["bytes_by_purpose"])
        if row["side"] == "ours":
            axes = {"tp": "tensor", "pp": "pipeline", "dp": "gradients"}
            assert {axes[part.split("=")[0]] for part in row["plan"].split(",") if part[:2] in axes} <= purposes
            assert row["bytes"] == sum(row["bytes_by_purpose"].values())
    assert "FSDP x PP zbv, small: ours" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "said"), [("--size", "huge", "small, medium"), ("--plans", "FSDP x EP", "FSDP x TP")]
)
def test_a_name_that_there_is_not(option, value, said, monkeypatch, capfd):
    assert armillary(monkeypatch, option, value) == 2
    assert said in capfd.readouterr().err


def test_unlike_work_is_not_timed():
    same = [(5.0, 1.0), (4.0, 2.0)]
    assert compare("it", same, same) == 0
    assert compare("it", [(5.00001, 1.0), (4.0, 2.0)], same) == pytest.approx(2e-6)
    for other in ([(5.001, 1.0), (4.0, 2.0)], [(5.0, 1.0), (4.0, 2.001)], [(float("nan"), 1.0), (4.0, 2.0)]):
        with pytest.raises(RuntimeError, match="it: ours and by hand differ"):
            compare("it", other, same)


def test_a_ratio_above_one_is_ours_faster():
    facts = {"bytes": {"tensor": 8}, "calls": 3, "difference": 1e-7, "load": [1.0, 1.0, 1.0]}
    times = {"ours": [1.0, 2.0, 9.0], "by hand": [3.0, 4.0, 5.0]}
    ours, theirs = rows_of(CASE, [{**facts, "seconds": times, "processor": times}] * 4)
    assert (ours["seconds"], ours["ratio"], ours["bytes"]) == (2.0, 2.0, 32)
    assert (theirs["seconds"], theirs["ratio"], theirs["bytes"]) == (4.0, 1.0, 0)
    # Wall time is of the slowest rank, processor time of all together.
    assert (ours["processor_seconds"], ours["processor_ratio"]) == (8.0, 2.0)


def test_data_ranks_share_out_a_step_and_micro_batches_share_out_a_rank():
    parts = [tokens_of_step(CASE, 3, rank) for rank in range(2)]
    tokens, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    assert tokens.shape == labels.shape == (CASE.size.batch, CASE.size.seq)
    assert (tokens[:, 1:] == labels[:, :-1]).all()
    assert (tokens != np.concatenate([tokens_of_step(CASE, 4, rank)[0] for rank in range(2)])).any()
    batches = batches_of(*parts[0], 4)
    assert (np.concatenate([batch.tokens for batch in batches]) == parts[0][0]).all()
    assert (batches[1].positions == np.arange(CASE.size.seq)).all()


@pytest.mark.parametrize(
    "case", [*(Case(name, plan, SIZES["medium"]) for name, plan in PLANS.items()), *growth_cases()]
)
def test_every_case_is_a_sound_config(case):
    config = case.config()
    assert not list(config.problems())
    assert config.plan.num_ranks == num_ranks(case) <= 8
    assert config.plan.cp == 1 or config.plan.context != "auto"  # nothing here measures the links
    assert case.size.batch % (config.plan.dp * config.optim.micro_batches) == 0
