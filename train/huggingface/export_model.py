"""`armillary export-hf`: a run's newest checkpoint as a folder that transformers loads."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armillary.parallel.mesh import joined_ranks
from armillary.parallel.plan import Plan
from armillary.train.checkpoint.load import read_facts, read_full
from armillary.train.data.tokenizer import load_tokenizer
from armillary.train.files import sync_folder, write_json
from armillary.train.huggingface.check import check_logits
from armillary.train.huggingface.families import family_of, write_config
from armillary.train.huggingface.weights import SHARD_BYTES, write_tensor_files
from armillary.train.initial_weights import shapes_of
from armillary.train.loaded_run import newest_checkpoint
from armillary.train.model.shape import num_parameters
from armillary.train.run_folder import open_run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export_hf(
    run: str | Path,
    path: str | Path,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Writes a run's newest sound checkpoint as a folder that transformers loads.

    Args:
        run: its folder or name.
        path: the new folder.
        dtype: of the tensors, "float32" or "bfloat16".
        shard_bytes: of one file at most.
        report: takes one line for each thing that takes time.

    Returns:
        `path`, `family`, `step`, and `logits_error` (None if transformers is not installed).

    Raises:
        ValueError: if there is no such run or checkpoint, no family computes its model, or the folder exists.
        LogitsDiffer: if transformers computes something else from it; then there is no folder.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: can be {' or '.join(DTYPES)}")
    path, folder = Path(os.path.expanduser(path)), open_run(run)
    if path.exists():
        raise ValueError(f"{path}: exists; name a folder that does not")
    config = folder.load_config()
    family = family_of(config.model)
    tokenizer = load_tokenizer(folder.path, "the run's tokenizer")
    with joined_ranks(Plan()) as ranks:
        checkpoint = newest_checkpoint(folder, ranks, report)
    step = read_facts(checkpoint)["progress"]["step"]

    def read(name: str) -> Tensor:
        return read_full(checkpoint, f"model/{name}").to(DTYPES[dtype])

    report(f"writing {num_parameters(config.model):,} parameters of {checkpoint} as a model of the family {family}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent, ignore_cleanup_errors=True) as made:
        aside = Path(made) / path.name
        aside.mkdir()
        write_tensor_files(aside, shapes_of(config.model), read, DTYPES[dtype].itemsize, shard_bytes)
        end = tokenizer.end_of_document
        write_json(aside / "config.json", write_config(config.model, config.data.sequence_length, end, dtype))
        write_json(aside / "generation_config.json", {"eos_token_id": end, "do_sample": True, "temperature": 0.8})
        tokenizer.save(aside)
        result = {"path": str(path), "family": family, "step": step, "logits_error": None}
        check_logits(result, f"{path} was not written", report, config.model, read, tokenizer, aside)
        sync_folder(aside)
        os.rename(aside, path)
        sync_folder(path.parent)
    return result
