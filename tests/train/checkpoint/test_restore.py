"""Checkpoints that do not fit or are damaged where one rank alone sees it: all ranks do the same, and say why."""

import os
import re
from pathlib import Path

import pytest
import torch.distributed as dist
from crossing_cases import CONFIG, save, train
from tiny_run import make_trainer

from armillary.train.checkpoint.restore import load_state, newest_sound
from armillary.train.checkpoint.store import complete, read_manifest
from armillary.train.config.run_config import load_config

TP2_PP2 = ["plan.tp=2", "plan.pp=2"]
OTHERS = {
    "a layer more": ["model.num_layers=6"],
    "a layer less": ["model.num_layers=4"],
    "another vocabulary": ["model.vocab_size=300"],
    "another head": ["model.tie_embeddings=false"],
    "another optimizer": ["optim.kind=muon"],
    "another precision": ["optim.precision=float32"],
}
SAID = {
    "a layer more": "'model/blocks.5",
    "a layer less": "'model/blocks.4.* is only in the checkpoint",
    "another vocabulary": r"'model/embedding.weight' is F64 \(300, 20\) here and F64 \(257, 20\) in the checkpoint",
    "another head": "'model/output.weight' is not in the checkpoint",
    "another optimizer": "'optimizer/momentum_buffer/blocks.*' is not in the checkpoint",
    "another precision": "F32 .* here and F64 .* in the checkpoint",
}


def settings(*more):
    return load_config("run.toml", ["optim.precision=float64", *more])


def save_twice(rank, folder):
    os.chdir(folder)
    trainer = make_trainer(rank, settings(*TP2_PP2), "run")
    trainer.begin()
    for until in (3, 6):
        train(trainer, until)
        save(trainer, "run")
    trainer.observer.close("finished")


def refused(config, rank):
    """What this rank says when it is to load the run."""
    trainer = make_trainer(rank, config, "run")
    with pytest.raises(ValueError) as caught:
        trainer.restore()
    # A rank that waits for another would not get here.
    dist.barrier()
    trainer.observer.close("failed")
    return str(caught.value)


def load_others(rank, folder):
    """What is said of each other model; then of a file that is cut after it was found sound; then damage in a stage."""
    os.chdir(folder)
    said = {title: refused(settings(*TP2_PP2, *other), rank) for title, other in OTHERS.items()}
    trainer = make_trainer(rank, settings("plan.dp=2", "plan.tp=2"), "run")
    last = Path("runs/run/checkpoints/step-00000006")
    victim = _only_of_the_last_stage(last)
    data = victim.read_bytes()
    dist.barrier()
    if rank == 0:
        victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    dist.barrier()
    notes = []
    chosen = newest_sound(last.parent, trainer.ranks, notes.append)
    trainer.restore()
    at = trainer.progress.step
    trainer.observer.close("finished")
    if rank == 0:
        victim.unlink()
    dist.barrier()
    said["gone"] = told_by_all(last, trainer)
    return said, str(chosen), notes, at


def told_by_all(path, trainer):
    with pytest.raises(ValueError) as caught:
        load_state(path, trainer.held, trainer.optimizers)
    return str(caught.value)


def _only_of_the_last_stage(checkpoint):
    """A file that holds nothing of the first stage."""
    held = read_manifest(checkpoint).held_by()
    name = next(name for name, items in held.items() if not any("blocks.0." in it[0] for it in items))
    return checkpoint / name


@pytest.fixture(scope="module")
def told(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("restore")
    (folder / "text.txt").write_text("\n".join(f"{number} and {number}" for number in range(300)))
    (folder / "run.toml").write_text(CONFIG)
    world(save_twice, 4, str(folder))
    assert len(complete(folder / "runs/run/checkpoints")) == 2
    return world(load_others, 4, str(folder))


@pytest.mark.parametrize("title", OTHERS)
def test_another_model_under_the_plan_is_refused_by_all_ranks_in_one_sentence(told, title):
    sentences = {said[title] for said, *_ in told}
    assert len(sentences) == 1
    sentence = sentences.pop()
    assert "step-00000006 is not of this model and optimizer" in sentence
    assert "\n" not in sentence
    assert re.search(SAID[title], sentence), sentence


def test_damage_in_a_file_of_one_stage_is_passed_over_by_all_ranks(told):
    for _, chosen, notes, at in told:
        assert chosen.endswith("step-00000003")
        assert at == 3
        assert "step-00000006 is not sound and is passed over" in notes[0]
    assert len({tuple(notes) for _, _, notes, _ in told}) == 1


def test_a_file_that_is_gone_by_the_time_it_is_read_stops_all_ranks(told):
    assert len({said["gone"] for said, *_ in told}) == 1
    assert "is missing; use an older checkpoint" in told[0][0]["gone"]
