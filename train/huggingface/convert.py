"""Models of Hugging Face's kind, both ways: `armillary import-hf` makes a run of one, `export-hf` one of a run.

Both pass tensors through one at a time, and end with a check against transformers' own model of the same files.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armillary.parallel.mesh import joined_ranks
from armillary.parallel.plan import Plan
from armillary.train.checkpoint.load import read_full
from armillary.train.checkpoint.local_part import whole_part
from armillary.train.checkpoint.restore import newest_sound
from armillary.train.checkpoint.save import Snapshot, write_tensors
from armillary.train.checkpoint.shards import encode_manifest, few, merge_parts
from armillary.train.checkpoint.store import publish, step_name, sync_folder, write_aside, write_json
from armillary.train.config import RunConfig, check_vocabulary
from armillary.train.data.dataset import DataConfig
from armillary.train.data.tokenizer import load_tokenizer
from armillary.train.failure import RunStopped
from armillary.train.huggingface.check import LARGEST_ERROR, logits_error, missing_for_check
from armillary.train.huggingface.families import (
    EMBEDDING,
    HEAD,
    family_of,
    read_config,
    their_name,
    write_config,
)
from armillary.train.huggingface.source import INDEX, Source, open_source
from armillary.train.initial_weights import shapes_of
from armillary.train.model.shape import ModelConfig, num_parameters
from armillary.train.run_folder import ROOT, RunFolder, create_run, open_run

PART_BYTES = 1 << 28
"""Of one file of an imported checkpoint: what is in memory at a time."""
SHARD_BYTES = 5_000_000_000
"""Of one file of an export, at most, as on Hugging Face's hub."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Shapes = Mapping[str, tuple[int, ...]]


class LogitsDiffer(RunStopped):
    """Our model is not the one in the files: the check's figures are in `result`."""

    def __init__(self, message: str, result: dict[str, Any]) -> None:
        super().__init__(message)
        self.result = result


# ---- Import ----------------------------------------------------------------------------------------------------------


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
    path = Path(path).expanduser()
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
            write_weights(folder.checkpoints, shapes_of(model), read, facts)
            stored = folder.checkpoints / step_name(0)
            if not _cannot_check(source.gguf_file, report):
                result["logits_error"] = logits_error(
                    model, lambda part: read_full(stored, f"model/{part}"), tokenizer, source.folder, source.gguf_file
                )
                _judge(result, "the run was not made", report)

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


def write_weights(
    checkpoints: Path, shapes: Shapes, read: Callable[[str], Tensor], facts: Mapping[str, Any], step: int = 0
) -> Path:
    """A checkpoint of weights alone, written file by file as ranks would, so that only a part is in memory."""
    unfinished = checkpoints / f"{step_name(step)}.tmp-import-1"
    unfinished.mkdir(parents=True)
    parts = []
    for number, names in enumerate(in_groups(shapes, 4, PART_BYTES)):
        data = {f"model/{name}": read(name) for name in names}
        local = {name: whole_part(name, tensor) for name, tensor in data.items()}
        snapshot = Snapshot(step, 1, unfinished, local, data, facts)
        parts.append(write_tensors(unfinished / f"rank-{number:05d}.safetensors", snapshot, num_ranks=1))
    write_aside(unfinished / "manifest.json", encode_manifest(merge_parts(parts)))
    published = publish(unfinished, step)
    write_aside(checkpoints / "latest", f"{published.name}\n".encode())
    return published


def in_groups(shapes: Shapes, itemsize: int, most: int) -> Iterator[list[str]]:
    """Names in order, in groups of at most `most` bytes, or of one tensor that is larger."""
    group: list[str] = []
    size = 0
    for name, shape in shapes.items():
        num_bytes = itemsize * torch.Size(shape).numel()
        if group and size + num_bytes > most:
            yield group
            group, size = [], 0
        group.append(name)
        size += num_bytes
    yield group


# ---- Export ----------------------------------------------------------------------------------------------------------


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
    path, folder = Path(path).expanduser(), open_run(run)
    if path.exists():
        raise ValueError(f"{path}: exists; name a folder that does not")
    config = folder.load_config()
    family = family_of(config.model)
    tokenizer = load_tokenizer(folder.path, "the run's tokenizer")
    with joined_ranks(Plan()) as ranks:
        checkpoint = newest_sound(folder.checkpoints, ranks, report)
    if checkpoint is None:
        raise ValueError(f"{folder.path}: has no checkpoint yet; continue it: armillary train --resume {folder.path}")
    step = int(checkpoint.name.partition("-")[2][:8])

    def read(name: str) -> Tensor:
        return read_full(checkpoint, f"model/{name}").to(DTYPES[dtype])

    report(f"writing {num_parameters(config.model):,} parameters of {checkpoint} as a model of the family {family}")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        write_tensor_files(aside, shapes_of(config.model), read, DTYPES[dtype].itemsize, shard_bytes)
        end = tokenizer.end_of_document
        write_json(aside / "config.json", write_config(config.model, config.data.sequence_length, end, dtype))
        write_json(aside / "generation_config.json", {"eos_token_id": end, "do_sample": True, "temperature": 0.8})
        tokenizer.save(aside)
        result = {"path": str(path), "family": family, "step": step, "logits_error": None}
        if not _cannot_check(None, report):
            result["logits_error"] = logits_error(config.model, read, tokenizer, aside)
            _judge(result, f"{path} was not written", report)
        aside.chmod(0o755)
        sync_folder(aside)
        os.rename(aside, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return result


def write_tensor_files(
    folder: Path, shapes: Shapes, read: Callable[[str], Tensor], itemsize: int, shard_bytes: int
) -> None:
    """`model.safetensors`, or several files and their index; one file's tensors are in memory at a time."""
    from safetensors.torch import save_file

    groups: Sequence[list[str]] = list(in_groups(shapes, itemsize, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        save_file({their_name(name): read(name) for name in names}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # the library lets no one else read
        with open(folder / file, "rb") as written:
            os.fsync(written.fileno())
        weight_map |= {their_name(name): file for name in names}
    if len(groups) > 1:
        total = sum(itemsize * torch.Size(shape).numel() for shape in shapes.values())
        write_aside(
            folder / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode()
        )


def _cannot_check(gguf_file: str | None, report: Callable[[str], None]) -> bool:
    missing = missing_for_check(gguf_file)
    if missing:
        report(f"the logits were not checked, since a package is not installed; pip install {missing}")
    return bool(missing)


def _judge(result: dict[str, Any], consequence: str, report: Callable[[str], None]) -> None:
    """Tells what the check found; raises if that is too much."""
    error = result["logits_error"]
    if error < LARGEST_ERROR:
        report(f"logits: the largest difference to transformers is {error:.1e} (allowed: {LARGEST_ERROR:g})")
        return
    raise LogitsDiffer(
        f"a logit differs from transformers' by {error:.3g}, which is more than {LARGEST_ERROR:g}; {consequence}",
        result,
    )
