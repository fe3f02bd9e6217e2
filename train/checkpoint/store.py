"""How checkpoints lie on disk, and how they come and go.

    checkpoints/step-00000100/rank-00000.safetensors ...   tensors, each rank's own shards
                              manifest.json                every tensor, shard, size and checksum, and the run's facts
    checkpoints/step-00000100.tmp-<attempt>-<save>/        being written, or left over by a killed run
    checkpoints/step-00000100.old-<attempt>-<save>/        complete; just being replaced by a newer save of that step
    checkpoints/latest                                     the newest one's name, for people and scripts

A folder is renamed to `step-*` when all in it is on disk, so that name alone says "complete"; whether its bytes are
still those that were written, train/checkpoint/verify.py says. Imports no torch.
"""

import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from armillary.train.checkpoint.manifest import Manifest, decode_manifest, untiled
from armillary.train.files import sync_folder
from armillary.train.words import few

MOST_MANIFEST_BYTES = 1 << 30

_COMPLETE = re.compile(r"step-(\d{8,12})(\.old-[\w-]+)?")
_UNFINISHED = re.compile(r"step-\d{8,12}\.tmp-(?P<attempt>\w+)-(?P<save>\d+)")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, and how many are kept."""

    __pydantic_config__ = {"extra": "forbid"}

    every: int = field(default=100, metadata={"min": 0})
    """Steps between two checkpoints; 0 for one at the end only. The last step is always saved."""
    keep: int = field(default=2, metadata={"min": 1})
    """Newest checkpoints to keep; older ones are removed after a new one is complete."""


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def complete(checkpoints: Path) -> list[Path]:
    """Every complete checkpoint, newest first; one that is being replaced (`.old-`) comes after its replacement."""
    if not checkpoints.is_dir():
        return []
    found = [(match, path) for path in checkpoints.iterdir() if (match := _COMPLETE.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda it: (-int(it[0][1]), it[0][2] or ""))]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete checkpoint.

    Raises:
        ValueError: if it is missing or damaged, or the shards of a tensor do not tile it.
    """
    path = folder / "manifest.json"
    try:
        if path.stat().st_size > MOST_MANIFEST_BYTES:
            raise ValueError(f"is longer than {MOST_MANIFEST_BYTES} bytes")
        manifest = decode_manifest(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    problems = untiled(manifest)
    if problems:
        raise ValueError(f"{path} cannot be used: {few(problems)}")
    return manifest


def publish(unfinished: Path, step: int) -> Path:
    """Renames a finished folder to its `step-*` name; at every moment, the old or the new one of that step is complete.

    Everything in `unfinished` is on disk already.
    """
    final = unfinished.with_name(step_name(step))
    old = unfinished.with_name(unfinished.name.replace(".tmp-", ".old-"))
    replaces = final.exists()
    if replaces:
        os.rename(final, old)
    try:
        os.rename(unfinished, final)
    except OSError:
        if replaces:
            os.rename(old, final)
        raise
    sync_folder(final.parent)
    return final


def prune(published: Path, keep: int) -> list[Path]:
    """Removes all complete checkpoints but the one just published and the `keep - 1` before it; returns the removed.

    The one just published was read back, so a sound one always stays. One of a later step is of a line that was left
    behind, or damaged: it goes too, lest the next resume take it for the newest.
    """
    everything = complete(published.parent)
    kept, steps = {published}, {_step(published)}
    for folder in everything:
        if _step(folder) < _step(published) and _step(folder) not in steps and len(kept) < keep:
            kept.add(folder)
            steps.add(_step(folder))
    removed = [folder for folder in everything if folder not in kept]
    for folder in removed:
        # Renamed first: a kill halfway must not leave half a checkpoint under a complete one's name.
        doomed = folder.with_name(f"{step_name(_step(folder))}.tmp-removed-{os.getpid()}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return removed


def sweep(checkpoints: Path, attempt: str, save: int) -> None:
    """Removes what killed runs and earlier saves of this one (those before number `save`) left unfinished."""
    for path in checkpoints.iterdir():
        match = _UNFINISHED.fullmatch(path.name)
        if match and (match["attempt"] != attempt or int(match["save"]) < save):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(".latest.") and path.name.endswith(".aside"):
            with suppress(FileNotFoundError):
                path.unlink()


def _step(folder: Path) -> int:
    match = _COMPLETE.fullmatch(folder.name)
    assert match is not None
    return int(match[1])
