"""How a checkpoint lies on disk: writing files safely, finding checkpoints, and whether their bytes can be believed.

    checkpoints/step-00000100/rank-00000.safetensors ...   tensors, each rank's own shards
                              manifest.json                every tensor, shard, size and checksum, and the run's facts
    checkpoints/step-00000100.tmp-<attempt>-<save>/        being written, or left over by a killed run
    checkpoints/step-00000100.old-<attempt>-<save>/        complete; just being replaced by a newer save of that step
    checkpoints/latest                                     the newest one's name, for people and scripts

A folder is renamed to `step-*` when all in it is on disk, so that name alone says "complete"; whether its bytes are
still those that were written, `verify` says. Checksums are xxh3_128: they find accidents, not forgery. Imports no
torch.
"""

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from armillary.train.checkpoint.shards import (
    ITEM_BYTES,
    Manifest,
    Shard,
    Stored,
    StoredFile,
    decode_manifest,
    few,
    numbers,
    untiled,
)

MOST_HEADER_BYTES = 100_000_000
"""Safetensors' own bound."""
MOST_MANIFEST_BYTES = 1 << 30
CHUNK_BYTES = 1 << 18

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


# ---- Files -----------------------------------------------------------------------------------------------------------


def sync_folder(folder: Path) -> None:
    """Makes names that were created, renamed or removed in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems order names themselves and refuse this.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_aside(path: Path, data: bytes) -> None:
    """Writes a file so that its name only ever shows the whole old or the whole new content, even after a power cut.

    Written to a temporary name in the same folder, fsynced, renamed, folder fsynced.

    Raises:
        OSError: as it comes, with nothing left behind.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.aside")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: object) -> None:
    """`write_aside` of `value` as JSON for people to read."""
    write_aside(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def safe_join(folder: Path, name: str) -> Path:
    """`folder / name` for a name that was read from a file.

    Raises:
        ValueError: if the name is absolute, has an empty, `.` or `..` part, or leads out of `folder` through a link.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in name or "\\" in name or ":" in parts[0]:
        raise ValueError(f"{folder}: {name!r} is no name of a file inside it; it must be relative, without '..'")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder}: {name!r} leads out of it through a link; put the file itself there")
    return path


# ---- Reading a checkpoint --------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file; `start` counts from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def read_header(file: BinaryIO, size: int) -> tuple[dict[str, Entry], str]:
    """The tensors of a safetensors file of `size` bytes, and the checksum of its header.

    Raises:
        ValueError: if the header is damaged, or the tensors do not fill the file without gap or overlap.
    """
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(MOST_HEADER_BYTES, size - 8):
        raise ValueError(f"its header claims {length} bytes")
    raw = file.read(length)
    try:
        entries = {name: _entry(value, 8 + length) for name, value in json.loads(raw).items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header cannot be read ({error})") from error
    position = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.num_bytes)):
        if entry.start != position:
            raise ValueError("its header leaves a gap between two tensors, or lets them overlap")
        position += entry.num_bytes
    if position != size:
        raise ValueError(f"its header describes {position} bytes, not {size}")
    return entries, xxhash.xxh3_128_hexdigest(prefix + raw)


def _entry(value: dict[str, Any], origin: int) -> Entry:
    dtype, shape = value["dtype"], numbers(value["shape"], "shape")
    start, end = numbers(value["data_offsets"], "offsets")
    if end - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"{end - start} bytes for {dtype} {shape}")
    return Entry(dtype, shape, origin + start, end - start)


def checksum_of(file: BinaryIO, start: int, num_bytes: int) -> str | None:
    """The checksum of a range of a file; None if the file ends before it."""
    digest, buffer = xxhash.xxh3_128(), bytearray(min(CHUNK_BYTES, num_bytes))
    file.seek(start)
    while num_bytes:
        read = file.readinto(memoryview(buffer)[: min(len(buffer), num_bytes)])  # type: ignore[attr-defined]
        if not read:
            return None
        digest.update(memoryview(buffer)[:read])
        num_bytes -= read
    return digest.hexdigest()


# ---- Verification ----------------------------------------------------------------------------------------------------


def verify(folder: Path, share: slice = slice(None)) -> list[str]:
    """What is wrong with a checkpoint: sentences that name file and tensor; none if every byte is as it was written.

    Args:
        folder: a `step-*` folder.
        share: which of its files to read, in the order of their names (`slice(rank, None, num_ranks)` shares the work).
    """
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return [str(error)]
    held = manifest.held_by()
    problems: list[str] = []
    for name in sorted(manifest.files)[share]:
        tensors = few([repr(tensor) for tensor, _, _ in held[name]], most=2) or "no tensors"
        try:
            problems += verify_file(safe_join(folder, name), manifest.files[name], held[name])
        except FileNotFoundError:
            problems.append(f"{name} is missing; it held {tensors}")
        except (OSError, ValueError) as error:
            problems.append(f"{name}, which holds {tensors}, cannot be read: {error}")
    return problems


def verify_file(path: Path, expected: StoredFile, held: Sequence[tuple[str, Stored, Shard]]) -> list[str]:
    """`verify` for one file: `held` says what it must hold.

    Raises:
        OSError, ValueError: if the file or its header cannot be read at all.
    """
    problems = []
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != expected.size:
            problems.append(f"{path.name} has {size} bytes; {expected.size} were written")
        entries, header = read_header(file, expected.size)
        if header != expected.header:
            problems.append(f"{path.name}: the checksum of its header differs")
        for name, stored, shard in held:
            entry = entries.get(name)
            if entry is None or (entry.dtype, entry.shape) != (stored.dtype, shard.box.sizes):
                problems.append(f"tensor {name!r} in {path.name}: the header of the file describes it otherwise")
                continue
            found = checksum_of(file, entry.start, entry.num_bytes)
            if found is None:
                problems.append(f"tensor {name!r} in {path.name}: the file ends before it does")
            elif found != shard.checksum:
                problems.append(f"tensor {name!r} in {path.name}: its checksum differs; its bytes changed on the disk")
    return problems


# ---- The folder of checkpoints ---------------------------------------------------------------------------------------


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def complete(checkpoints: Path) -> list[Path]:
    """Every complete checkpoint, newest first; one that is being replaced (`.old-`) comes after its replacement."""
    if not checkpoints.is_dir():
        return []
    found = [(match, path) for path in checkpoints.iterdir() if (match := _COMPLETE.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda it: (-int(it[0][1]), it[0][2] or ""))]


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
