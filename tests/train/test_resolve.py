"""What `auto` becomes: the same on every rank, kept in the run's config."""

import os
from pathlib import Path

import torch

from armillary.parallel.mesh import make_ranks
from armillary.parallel.plan import Plan
from armillary.train.config.run_config import RunConfig, load_config
from armillary.train.resolve import resolve, shape_of


def resolved(rank: int, folder: Path, overrides: list[str]) -> tuple[str, str, list[str]]:
    os.chdir(folder)
    (folder / "run.toml").touch()
    config = load_config("run.toml", overrides)
    config, notes = resolve(config, make_ranks(config.plan, torch.device("cpu")))
    return config.plan.context, config.plan.context_backward, notes


def test_all_ranks_choose_the_same_and_say_why(world, tmp_path):
    found = world(resolved, 4, tmp_path, ["plan.dp=2", "plan.cp=2"])
    assert all(choice == found[0] for choice in found)
    forward, backward, notes = found[0]
    assert "auto" not in (forward, backward)
    assert len(notes) == 2
    assert notes[0].startswith(f"forward: {forward}, ")
    assert notes[1].startswith(f"backward: {backward}, ")
    assert "B/s" in notes[0]


def test_what_is_named_is_kept(world, tmp_path):
    assert world(resolved, 2, tmp_path, ["plan.cp=2", "plan.context=token_ring"])[0] == ("token_ring", "", [])
    forward, backward, notes = world(resolved, 2, tmp_path, ["plan.cp=2", "plan.context_backward=token_ring"])[0]
    assert (forward != "auto", backward, len(notes)) == (True, "token_ring", 1)


def test_one_rank_has_nothing_to_choose(world, tmp_path):
    assert world(resolved, 1, tmp_path, [])[0] == ("auto", "", [])


def test_the_shape_is_that_of_a_micro_batch():
    config = RunConfig(plan=Plan(dp=2, cp=3))
    shape = shape_of(config)
    assert (shape.ranks, shape.rows, shape.tokens) == (3, 8, 8 * -(-config.data.sequence_length // 3))
