"""The weights that a run begins with when they are another run's: `model.weights`, an imported model's say.

Only a run without a checkpoint of its own looks at them; its optimizer begins afresh.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import fields, replace

from armillary.parallel.held import Held
from armillary.train.checkpoint.restore import load_weights, newest_sound
from armillary.train.checkpoint.store import complete, read_manifest
from armillary.train.model.shape import ModelConfig
from armillary.train.model.transformer import Transformer
from armillary.train.run_folder import RunFolder, open_run
from armillary.train.words import few


def checked_weights(model: ModelConfig, report: Callable[[str], None]) -> ModelConfig:
    """The config with the place of its weights made absolute, after names and shapes were held against the model.

    Args:
        report: told of what shapes do not show, where it differs from the model that had the weights.

    Raises:
        ValueError: if `model.weights` is no run with a checkpoint of this shape.
    """
    if not model.weights:
        return model
    folder = _open(model.weights)
    where = f'model.weights = "{model.weights}"'
    checkpoints = complete(folder.checkpoints)
    if not checkpoints:
        raise ValueError(f"{where}: the run has no checkpoint yet; name one that has, or leave model.weights out")
    stored = {
        name.removeprefix("model/"): tensor.shape
        for name, tensor in read_manifest(checkpoints[0]).tensors.items()
        if name.startswith("model/")
    }
    wrong = list(_differences(shapes_of(model), stored))
    if wrong:
        raise ValueError(
            f"{where}: its weights do not fit this model: {few(wrong)}. Take the keys of [model] from "
            f"{folder.config}, or leave model.weights out"
        )
    before = folder.load_config().model
    for spec in fields(ModelConfig):
        if spec.name not in ("seed", "weights") and (was := _meant(before, spec.name)) != _meant(model, spec.name):
            report(f"model.{spec.name} is {_meant(model, spec.name)}, but {was} where the weights come from")
    return replace(model, weights=os.path.abspath(folder.path))


def take_weights(model: ModelConfig, held: Held, note: Callable[[str], None]) -> None:
    """Fills what a rank holds of a model from the newest sound checkpoint of the run `model.weights`, if there is one.

    Every rank calls it; each reads its own pieces only.

    Raises:
        ValueError: on all ranks, if there is no such run or checkpoint, or it is of another model.
    """
    if not model.weights:
        return
    path = newest_sound(_open(model.weights).checkpoints, held.ranks, note)
    if path is None:
        raise ValueError(f'model.weights = "{model.weights}": the run has no checkpoint')
    load_weights(path, held)
    note(f"begins with the weights of {path}")


def shapes_of(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of every parameter of the whole model, in its order."""
    import torch

    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Transformer(model).named_parameters()}


def _open(weights: str) -> RunFolder:
    try:
        return open_run(os.path.expanduser(weights))
    except ValueError as error:
        raise ValueError(
            f"model.weights: {error}; a model of Hugging Face's becomes one with armillary import-hf"
        ) from None


def _differences(wanted: dict[str, tuple[int, ...]], stored: dict[str, tuple[int, ...]]) -> Iterator[str]:
    yield from (f"{name!r} is missing there" for name in wanted if name not in stored)
    yield from (f"{name!r} is only there" for name in stored if name not in wanted)
    for name, shape in wanted.items():
        if stored.get(name, shape) != shape:
            yield f"{name!r} is {shape} here and {stored[name]} there"


def _meant(model: ModelConfig, name: str) -> object:
    """A field's value, where it was left out what that means."""
    meant = {"num_kv_heads": model.kv_heads, "head_dim": model.head_size, "ffn_dim": model.hidden}
    return meant.get(name, getattr(model, name))
