"""Runs that begin with another run's weights: on any number of ranks, once, and only where they fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from armillary.parallel.held import Held
from armillary.parallel.mesh import make_ranks
from armillary.parallel.plan import Plan
from armillary.train.build import build_engine
from armillary.train.config.run_config import RunConfig
from armillary.train.data.config import DataConfig
from armillary.train.data.tokenizer import byte_tokenizer
from armillary.train.huggingface.weights import write_checkpoint
from armillary.train.initial_weights import checked_weights, shapes_of, take_weights
from armillary.train.model.shape import ModelConfig
from armillary.train.optim.schedule import OptimConfig
from armillary.train.run_folder import create_run

MODEL = ModelConfig(dim=24, num_layers=2, num_heads=3, ffn_dim=40, vocab_size=61, rope_theta=500.0)


def a_run(name: str, model: ModelConfig = MODEL, weights: bool = True) -> Path:
    """A run whose first checkpoint holds weights that tell their places."""
    folder = create_run(RunConfig(model=model, data=DataConfig(tokenizer="bytes")), "x", name, byte_tokenizer())
    if weights:
        write_checkpoint(folder.checkpoints, shapes_of(model), told, {"progress": {"step": 0}})
    return folder.path.absolute()


def told(name: str) -> torch.Tensor:
    shape = shapes_of(MODEL)[name]
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape) / 7 + len(name)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def filled(rank: int, weights: str, damaged: str, plans: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Under each plan, the largest error of every parameter against the run that it came from."""
    found = []
    for degrees in plans:
        held = build(degrees, weights)
        notes: list[str] = []
        take_weights(replace(MODEL, weights=weights), held, notes.append)
        assert len(notes) == 1
        parameters, errors = held.parameters(), {}
        for name in held.cuts:
            whole = held.whole(name, parameters.get(name), torch.float32, "test")
            errors[name] = float((whole - told(name)).abs().max())
        found.append(errors)
    with pytest.raises(ValueError, match="none of them is sound"):
        take_weights(replace(MODEL, weights=damaged), held, print)
    return found


def build(degrees: dict[str, Any], weights: str) -> Held:
    plan = Plan(**degrees)
    optim = OptimConfig(precision="float32", micro_batches=2)
    config = RunConfig(model=replace(MODEL, weights=weights), plan=plan, optim=optim)
    return build_engine(config, make_ranks(plan, torch.device("cpu"))).held


@pytest.mark.parametrize("plans", [[{"tp": 2}, {"pp": 2}], [{"dp": 3}]], ids=str)
def test_all_ranks_hold_the_weights_together(world: Any, here: Path, plans: list[dict[str, Any]]) -> None:
    """And all of them refuse weights of which one bit is another."""
    path, damaged = a_run("source"), a_run("damaged")
    file = next(damaged.glob("checkpoints/*/rank-00000.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for found in world(filled, max(plans[0].values()), str(path), str(damaged), plans):
        assert found == [dict.fromkeys(shapes_of(MODEL), 0.0)] * len(plans)


def test_what_fits_is_made_absolute(here: Path) -> None:
    path, said = a_run("source"), list[str]()
    for name in ("source", "runs/source"):
        assert checked_weights(replace(MODEL, weights=name), said.append).weights == str(path)
    assert said == []
    assert checked_weights(MODEL, said.append) is MODEL


def test_what_shapes_do_not_show_is_told(here: Path) -> None:
    a_run("source")
    said: list[str] = []
    checked_weights(replace(MODEL, weights="source", rope_theta=1e4, window=5, ffn_dim=40), said.append)
    assert said == [
        "model.rope_theta is 10000.0, but 500.0 where the weights come from",
        "model.window is 5, but None where the weights come from",
    ]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dim": 27}, r"do not fit this model: 'embedding.weight' is \(61, 27\) here and \(61, 24\) there"),
        ({"num_layers": 3}, r"'blocks.2.attention_norm.weight' is missing there"),
        ({"num_layers": 1}, r"'blocks.1.attention.key.weight' is only there"),
        ({"tie_embeddings": False}, r"'output.weight' is missing there"),
        ({"weights": "nothing"}, r"model.weights: nothing: is no run .* armillary import-hf"),
        ({"weights": "empty"}, r'model.weights = "empty": the run has no checkpoint yet'),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(here: Path, changes: dict[str, Any], sentence: str) -> None:
    a_run("source")
    a_run("empty", weights=False)
    with pytest.raises(ValueError, match=sentence):
        checked_weights(replace(MODEL, **({"weights": "source"} | changes)), print)
