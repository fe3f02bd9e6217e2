"""The manifest of a checkpoint: what is in it and where, with a checksum of every part and of itself.

Read as what a stranger wrote: everything within bounds, or ValueError. Bytes and numbers alone: no tensors, no torch.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

from armillary.train.checkpoint.boxes import Box, pieces, tiles
from armillary.train.words import few

FORMAT = 1
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
"""Bytes of one element of each dtype, by safetensors' names."""
MOST_BYTES = 1 << 50
"""Of one tensor or file: what a manifest may claim before it is called damaged."""
MOST_DIMS = 16
MOST_NAME = 1000


@dataclass(frozen=True)
class Shard:
    """The part of a tensor that one file holds, under the tensor's own name."""

    file: str
    box: Box
    checksum: str


@dataclass(frozen=True)
class Stored:
    """A tensor: its dtype by safetensors' name, its global shape, and where its elements are."""

    dtype: str
    shape: tuple[int, ...]
    shards: tuple[Shard, ...]

    def bytes_of(self, shard: Shard) -> int:
        return shard.box.volume * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class StoredFile:
    """A safetensors file: its bytes, and the checksum of its header; every other byte belongs to one shard."""

    size: int
    header: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds; or, before the ranks' parts are merged, what one rank wrote of it."""

    step: int
    num_ranks: int
    facts: Mapping[str, Any]
    files: Mapping[str, StoredFile]
    tensors: Mapping[str, Stored]

    @property
    def weights(self) -> str:
        """One checksum of all tensors named `model/...`, to compare two runs by.

        It covers names, dtypes, shard boxes and shard checksums: equal weights give equal strings on one sharding, and
        others when they are sharded over another number of ranks.
        """
        lines = [
            f"{name} {stored.dtype} {shard.box.offsets} {shard.box.sizes} {shard.checksum}"
            for name, stored in sorted(self.tensors.items())
            if name.startswith("model/")
            for shard in sorted(stored.shards, key=lambda shard: shard.box.offsets)
        ]
        return xxhash.xxh3_128_hexdigest("\n".join(lines).encode())

    def held_by(self) -> dict[str, list[tuple[str, Stored, Shard]]]:
        """What each file holds: name, tensor and shard."""
        held: dict[str, list[tuple[str, Stored, Shard]]] = {name: [] for name in self.files}
        for name, stored in self.tensors.items():
            for shard in stored.shards:
                held[shard.file].append((name, stored, shard))
        return held


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as JSON, with a checksum of itself."""
    content = {
        "format": FORMAT,
        "step": manifest.step,
        "num_ranks": manifest.num_ranks,
        "weights": manifest.weights,
        "facts": manifest.facts,
        "files": {name: {"size": file.size, "header": file.header} for name, file in manifest.files.items()},
        "tensors": {
            name: {
                "dtype": stored.dtype,
                "shape": stored.shape,
                "shards": [
                    {
                        "file": shard.file,
                        "offsets": shard.box.offsets,
                        "sizes": shard.box.sizes,
                        "bytes": stored.bytes_of(shard),
                        "checksum": shard.checksum,
                    }
                    for shard in stored.shards
                ],
            }
            for name, stored in manifest.tensors.items()
        },
    }
    text = _canonical(content)
    return b'{"checksum":"%s","manifest":%s}\n' % (xxhash.xxh3_128_hexdigest(text).encode(), text)


def decode_manifest(data: bytes) -> Manifest:
    """The manifest in these bytes; everything in it within bounds, and no byte other than as it was written.

    Raises:
        ValueError: if it is not so.
    """
    try:
        outer = json.loads(data)
        content = outer["manifest"]
        text = _canonical(content)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"is no JSON of a manifest ({type(error).__name__}: {error})") from error
    if data != b'{"checksum":"%s","manifest":%s}\n' % (xxhash.xxh3_128_hexdigest(text).encode(), text):
        raise ValueError("differs from its own checksum")
    try:
        return _parse_manifest(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"lacks a key or has a value of a wrong kind ({error})") from error


def merge_parts(parts: Iterable[Manifest]) -> Manifest:
    """One manifest from every rank's part, in rank order; the facts are rank 0's.

    Raises:
        ValueError: if the ranks disagree about a tensor, or the shards of one do not tile it.
    """
    ordered = list(parts)
    tensors: dict[str, Stored] = {}
    for rank, part in enumerate(ordered):
        for name, stored in part.tensors.items():
            known = tensors.get(name, Stored(stored.dtype, stored.shape, ()))
            if (known.dtype, known.shape) != (stored.dtype, stored.shape):
                raise ValueError(
                    f"tensor {name!r} is {stored.dtype} {stored.shape} on rank {rank} and {known.dtype} {known.shape} "
                    "on the ranks before it"
                )
            tensors[name] = Stored(stored.dtype, stored.shape, known.shards + stored.shards)
    files = {name: file for part in ordered for name, file in part.files.items()}
    manifest = Manifest(ordered[0].step, len(ordered), ordered[0].facts, files, tensors)
    problems = untiled(manifest)
    if problems:
        raise ValueError(few(problems))
    return manifest


def untiled(manifest: Manifest) -> list[str]:
    """A sentence for each tensor whose shards do not hold every element exactly once."""
    return [
        f"the {len(stored.shards)} shards of tensor {name!r} do not hold each element of its shape {stored.shape} once"
        for name, stored in manifest.tensors.items()
        if not tiles(stored.shape, [shard.box for shard in stored.shards])
    ]


def reads(manifest: Manifest, wanted: Mapping[str, Box]) -> dict[str, list[tuple[str, Shard, Box]]]:
    """What has to be read, by file, for the wanted boxes of tensors: name, shard, and the part of it that is wanted."""
    found: dict[str, list[tuple[str, Shard, Box]]] = {}
    for name, box in wanted.items():
        for shard, part in pieces(box, ((shard, shard.box) for shard in manifest.tensors[name].shards)):
            found.setdefault(shard.file, []).append((name, shard, part))
    return dict(sorted(found.items()))


def _canonical(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _parse_manifest(content: dict[str, Any]) -> Manifest:
    if content["format"] != FORMAT:
        raise ValueError(f"has format {content['format']!r}; this version of armillary reads format {FORMAT}")
    files = {
        _file_name(name): StoredFile(whole_number(entry["size"], "size", MOST_BYTES), _checksum(entry["header"]))
        for name, entry in content["files"].items()
    }
    tensors = {tensor_name(name): _parse_stored(name, entry, files) for name, entry in content["tensors"].items()}
    if not isinstance(content["facts"], dict):
        raise ValueError("has facts that are no table")
    step, num_ranks = (whole_number(content[key], key, 1 << 40) for key in ("step", "num_ranks"))
    manifest = Manifest(step, num_ranks, content["facts"], files, tensors)
    for name, held in manifest.held_by().items():
        if (held_bytes := sum(stored.bytes_of(shard) for _, stored, shard in held)) > files[name].size:
            raise ValueError(f"puts {held_bytes} bytes of tensors into {name}, which has {files[name].size}")
    return manifest


def _parse_stored(name: str, entry: dict[str, Any], files: Mapping[str, StoredFile]) -> Stored:
    dtype, shape = entry["dtype"], numbers(entry["shape"], f"shape of {name!r}")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"gives tensor {name!r} the dtype {dtype!r}; it must be one of {', '.join(ITEM_BYTES)}")
    if math.prod(shape) * ITEM_BYTES[dtype] > MOST_BYTES:
        raise ValueError(f"gives tensor {name!r} the shape {shape}, more than {MOST_BYTES} bytes")
    shards = []
    for item in entry["shards"]:
        box = Box(numbers(item["offsets"], f"offsets of {name!r}"), numbers(item["sizes"], f"sizes of {name!r}"))
        shard = Shard(_file_name(item["file"]), box, _checksum(item["checksum"]))
        inside = len(box.offsets) == len(box.sizes) == len(shape) and all(map(int.__le__, box.ends, shape))
        if not inside or shard.file not in files or item["bytes"] != box.volume * ITEM_BYTES[dtype]:
            raise ValueError(f"has a shard of tensor {name!r} outside of its shape {shape}, its bytes or the files")
        shards.append(shard)
    return Stored(dtype, shape, tuple(shards))


def whole_number(value: object, what: str, most: int) -> int:
    """A number that was read from a file, within bounds; raises ValueError if it is not."""
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"has {what} {value!r}; it must be a whole number from 0 to {most}")
    return value


def numbers(values: object, what: str) -> tuple[int, ...]:
    """A shape or offsets that were read from a file, within bounds; raises ValueError if they are not."""
    if not isinstance(values, list) or len(values) > MOST_DIMS:
        raise ValueError(f"has {what} {values!r:.80}; it must be a list of at most {MOST_DIMS} numbers")
    return tuple(whole_number(value, what, MOST_BYTES) for value in values)


def tensor_name(name: str) -> str:
    """`name`, if a tensor may be called so; raises ValueError if not."""
    if not 0 < len(name) <= MOST_NAME or not name.isprintable() or name == "__metadata__":
        raise ValueError(f"has a tensor named {name!r:.80}; names are 1 to {MOST_NAME} printable characters")
    return name


def _file_name(name: object) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"rank-\d{5,9}\.safetensors", name):
        raise ValueError(f"names a file {name!r:.80}; files are called rank-00000.safetensors and so on")
    return name


def _checksum(text: object) -> str:
    if not isinstance(text, str) or not re.fullmatch(r"[0-9a-f]{32}", text):
        raise ValueError(f"has a checksum {text!r:.80}; it must be 32 hexadecimal digits")
    return text
