"""A model cut to the layers of one pipeline stage."""

from typing import Any

from torch import nn


def cut_to_stage(model: nn.Module, layers: range, begins: bool, ends: bool) -> None:
    """Removes, in place, what is not in the stage: blocks, embedding, last norm, output matrix.

    What is left keeps its names. With tied embeddings, the last stage keeps `embedding` for its matrix; then two stages
    hold the same parameter, each with its own part of the gradient.

    Args:
        model: a Transformer (train/model/transformer.py), best on the meta device.
        layers: numbers of the blocks that stay; may be none.
        begins: whether it takes tokens, not hidden.
        ends: whether it returns logits or the loss, not hidden.

    Raises:
        ValueError: if the model lacks one of the layers.
    """
    stage: Any = model
    missing = [number for number in layers if str(number) not in stage.blocks]
    if missing:
        raise ValueError(f"pipeline: a stage is to hold layers {missing}, which the model does not have")
    for number in list(stage.blocks):
        if int(number) not in layers:
            del stage.blocks[number]
    tied = stage.output is None
    if not begins and not (ends and tied):
        stage.embedding = None
    if not ends:
        stage.norm = stage.output = None
    stage.begins, stage.ends = begins, ends
