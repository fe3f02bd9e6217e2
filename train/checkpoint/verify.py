"""Whether the bytes of a checkpoint are still those that were written: every tensor, every header, the manifest.

Checksums are xxh3_128: they find accidents, not forgery. Imports no torch.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from armillary.train.checkpoint.manifest import ITEM_BYTES, Shard, Stored, StoredFile, numbers
from armillary.train.checkpoint.store import read_manifest
from armillary.train.files import safe_join
from armillary.train.words import few

MOST_HEADER_BYTES = 100_000_000
"""Safetensors' own bound."""
CHUNK_BYTES = 1 << 18


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
