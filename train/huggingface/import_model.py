"""`armillary import-hf`: a run made of a model that others trained; its checkpoint 0 holds the weights."""

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armillary.train.checkpoint.load import read_full
from armillary.train.config.run_config import RunConfig, check_vocabulary
from armillary.train.data.config import DataConfig
from armillary.train.huggingface.check import check_logits
from armillary.train.huggingface.families import EMBEDDING, HEAD, read_config, their_name
from armillary.train.huggingface.source import Source, open_source
from armillary.train.huggingface.weights import write_checkpoint
from armillary.train.initial_weights import shapes_of
from armillary.train.model.shape import ModelConfig, num_parameters
from armillary.train.run_folder import ROOT, RunFolder, create_run
from armillary.train.words import few


def import_hf(path: str | Path, name: str = "", report: Callable[[str], None] = print) -> dict[str, Any]:
    """Makes a run of a Hugging Face folder or a GGUF file: its config, tokenizer, and a checkpoint of its weights.

    Args:
        path: the folder or file.
        name: of the run; that of the folder or file if empty.
        report: takes one line for each thing that takes time.

    Returns:
        `run`, `parameters`, and `logits_error` (None if transformers is not installed).

    Raises:
        ValueError: if what is there cannot be imported; names file and key.
        LogitsDiffer: if transformers computes something else from it; then there is no run.
    """
    path = Path(os.path.expanduser(path))
    name = name or re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().stem if path.is_file() else path.resolve().name)
    run = ROOT / name
    if run.exists():
        raise ValueError(f"{run} exists; choose another --name")
    with ExitStack() as files:
        source = open_source(path, files)
        model = read_config(source.config, source.where)
        read = matched(source, model)
        tokenizer = source.tokenizer()
        data = DataConfig(
            tokenizer=os.path.abspath(run), sequence_length=max(2, source.config["max_position_embeddings"])
        )
        config = RunConfig(model=model, data=data)
        check_vocabulary(config, tokenizer.vocab_size)
        result = {"run": str(run), "parameters": num_parameters(model), "logits_error": None}

        def fill(folder: RunFolder) -> None:
            report(f"reading {num_parameters(model):,} parameters from {path}")
            facts = {"progress": {"step": 0, "cursor": 0, "tokens": 0}, "data": "", "imported": path.name}
            stored = write_checkpoint(folder.checkpoints, shapes_of(model), read, facts)

            def read_back(part: str) -> Tensor:
                return read_full(stored, f"model/{part}")

            check_logits(
                result, "the run was not made", report, model, read_back, tokenizer, source.folder, source.gguf_file
            )

        folder = create_run(config, path, name, tokenizer, fill)
    return result | {"run": str(folder.path)}


def matched(source: Source, model: ModelConfig) -> Callable[[str], Tensor]:
    """What reads a parameter by our name, after the names and shapes of all were held against our model.

    Raises:
        ValueError: if tensors are missing, too many, or of another shape.
    """
    shapes = shapes_of(model)
    wanted = {their_name(name): shape for name, shape in shapes.items()}
    # Older files hold the rotary frequencies, which follow from the config.
    found = {name: shape for name, shape in source.shapes.items() if not name.endswith("rotary_emb.inv_freq")}
    if model.tie_embeddings and found.get(HEAD) is not None and found.get(HEAD) == found.get(EMBEDDING):
        if not torch.equal(source.read(HEAD), source.read(EMBEDDING)):
            raise ValueError(
                f"{source.where}: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}; set it to false"
            )
        del found[HEAD]
    missing, extra = (few([*(repr(name) for name in some)]) for some in (wanted.keys() - found, found.keys() - wanted))
    if missing:
        raise ValueError(f"{source.where}: the tensors lack {missing}, which a {source.config['model_type']} has")
    if extra:
        raise ValueError(f"{source.where}: the tensors have {extra}, which a {source.config['model_type']} has not")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ValueError(f"{source.where}: {name!r} is {found[name]}, but by the config it is {shape}")
    return lambda name: source.read(their_name(name))
