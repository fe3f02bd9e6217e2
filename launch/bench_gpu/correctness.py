"""Attention on the card against float64: head dims, dtypes, masks, documents, ring tiles, partial results.

Each job shares its compiled kernels, so that the processes of this section compile nothing twice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from armillary.kernels.attention import call as front
from armillary.kernels.attention.call import Gradients, Partial, row_dots
from armillary.kernels.attention.choice import choose
from armillary.kernels.attention.mask import Mask
from armillary.kernels.attention.places import Places
from armillary.kernels.attention.reference import reference, seen
from armillary.kernels.attention.tiles import Tile
from armillary.launch.bench_gpu.compare import judge, nan_filled, results
from armillary.launch.bench_gpu.sections import Job
from armillary.launch.bench_gpu.timing import Setting, error_text
from armillary.launch.rows import Row

HEAD_DIMS = (128, 64, 256, 32, 80, 96, 192)
MASKS = {
    "full": Mask(causal=False),
    "causal": Mask(),
    "window": Mask(window=200),
    "band": Mask(causal=False, window=150),
    "sinks": Mask(window=192, sinks=64, block=64),
    "strided": Mask(window=128, sinks=64, block=64, stride=3, shift=1),
}
HELD = 2.0**-6
"""What stands in the buffers that gradients of keys are added to."""
NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Sizes:
    """Of the tensors, and how long a row is."""

    head_dim: int
    dtype: torch.dtype
    seq: int
    heads: int = 4
    kv_heads: int = 2

    @property
    def kind(self) -> str:
        return f"d{self.head_dim} {str(self.dtype).removeprefix('torch.')}"


def jobs(setting: Setting) -> list[Job]:
    if setting.dry:
        small = Sizes(16, torch.float32, 17, 2, 1)
        masks = {"causal": Mask(), "strided": Mask(window=4, sinks=4, block=4, stride=3, shift=1)}
        return [_job(setting, small, name, masks) for name in masks]
    found = []
    for head_dim in HEAD_DIMS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            if choose(torch.device("cuda"), dtype, head_dim).implementation != "triton":
                continue
            sizes = Sizes(head_dim, dtype, 777)
            wide = dtype == torch.bfloat16 and head_dim in (64, 128)
            names = MASKS if wide else ["causal"] + ["strided"] * (head_dim in (64, 128, 192))
            found += [_job(setting, sizes, name, MASKS) for name in names]
    return found


def _job(setting: Setting, sizes: Sizes, name: str, masks: dict[str, Mask]) -> Job:
    return f"attention {name} {sizes.kind}", partial(check_mask, setting, sizes, name, masks[name])


def check_mask(setting: Setting, sizes: Sizes, name: str, mask: Mask) -> list[Row]:
    """All tiles of one mask, dtype and head dim."""
    rows = []
    parts = sizes.head_dim in (16, 64, 128) and (sizes.dtype == torch.bfloat16 or name == "causal")
    for where, tile in tiles(sizes, mask).items():
        told = f"attention {name} {sizes.kind} {where}"
        for kind, check in (("", whole), (" in parts", in_parts)):
            if kind and (where == "striped" or not parts):
                continue
            try:
                rows.append(check(setting, sizes, tile, told + kind))
            except Exception as error:  # the other tiles are checked all the same
                rows.append({"name": told + kind, "ok": False, "error": error_text(error)})
    return rows


def tiles(sizes: Sizes, mask: Mask) -> dict[str, Tile]:
    """In order; packed documents, of one token too; striped over ranks, where early queries see nothing."""
    seq, scale = sizes.seq, sizes.head_dim**-0.5
    plain = Places.in_order(2, seq)
    lengths = [seq // 2 + 3, 1, seq // 4, seq - seq // 2 - 4 - seq // 4]
    packed = Places.packed([lengths, lengths])
    if seq > 100:
        # The second row's tokens stand the other way round, each a run of its own: too slow for the interpreter.
        positions, documents = (grid.numpy().copy() for grid in (packed.positions(), packed.documents()))
        positions[1], documents[1] = positions[0, ::-1], documents[0, ::-1]
        packed = Places.of(positions, documents)
    queries, keys = Places.in_order(2, seq, 5, 4), Places.in_order(2, seq - seq // 3, seq // 3, 3)
    first = 1 if mask.shift else 0
    return {
        "in order": Tile(plain, plain, mask, scale, first),
        "packed": Tile(packed, packed, mask, scale, first),
        "striped": Tile(queries, keys, mask, scale, first),
    }


def tensors(setting: Setting, sizes: Sizes, tile: Tile) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v, views of wider tensors whose other channels are NaN; and the pulls of out and lse."""
    generator = torch.Generator().manual_seed(sizes.head_dim + tile.queries.seq)
    shapes = [(tile.queries, sizes.heads), (tile.keys, sizes.kv_heads), (tile.keys, sizes.kv_heads)]
    inputs = []
    for places, heads in shapes:
        # With 80 channels, rows do not begin where wide loads may.
        more = 8 if sizes.head_dim == 80 else 16
        room = torch.full((places.batch, places.seq, heads, sizes.head_dim + more), math.nan, dtype=sizes.dtype)
        room[..., : sizes.head_dim] = torch.randn(*room.shape[:3], sizes.head_dim, generator=generator)
        inputs.append(room.to(setting.device)[..., : sizes.head_dim])
    out = torch.randn(inputs[0].shape, generator=generator).to(setting.device, sizes.dtype)
    lse = torch.randn(out.shape[0], out.shape[2], out.shape[1], generator=generator).to(setting.device)
    return inputs, [out, lse]


def whole(setting: Setting, sizes: Sizes, tile: Tile, name: str) -> Row:
    """Out, log-sum-exp and all gradients of one call."""
    inputs, pulls = tensors(setting, sizes, tile)
    facts: dict[str, Any] = {
        "mask": tile.mask,
        "scale": tile.scale,
        "first_head": tile.first_head,
        "implementation": "triton",
    }

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Partial:
        return front.attention(q, k, v, tile.queries, tile.keys, **facts)

    with nan_filled():
        got, again = (results(ours, inputs, pulls) for _ in range(2))
    return judge(name, NAMES, got, *_others(tile, inputs, pulls), again)


def in_parts(setting: Setting, sizes: Sizes, tile: Tile, name: str) -> Row:
    """Out folded over three tiles of striped keys, and gradients added up in float32 buffers."""
    inputs, pulls = tensors(setting, sizes, tile)
    with nan_filled():
        got, again = (_parts(tile, inputs, pulls) for _ in range(2))
    return judge(name, NAMES, got, *_others(tile, inputs, pulls), again)


def _parts(tile: Tile, inputs: Sequence[Tensor], pulls: Sequence[Tensor]) -> list[Tensor]:
    q, k, v = inputs
    positions, documents = tile.keys.positions(), tile.keys.documents()
    parts = [torch.arange(first, tile.keys.seq, 3) for first in range(3)]
    cut = [replace(tile, keys=Places.of(positions[:, part], documents[:, part])) for part in parts]
    into = None
    for part, piece in zip(parts, cut, strict=True):
        own = (k[:, part.to(k.device)], v[:, part.to(k.device)])
        into = front.forward(q, *own, piece, into, torch.float32, implementation="triton")
    assert into is not None
    delta = row_dots(into.out, pulls[0], into.lse, pulls[1])
    d_q, d_k, d_v = (torch.zeros(tensor.shape, device=q.device) for tensor in (q, k, v))
    for part, piece in zip(parts, cut, strict=True):
        own = (k[:, part.to(k.device)], v[:, part.to(k.device)])
        of_keys, of_values = (torch.full(each.shape, HELD, device=q.device) for each in own)
        buffers = Gradients(d_q, of_keys, of_values)
        front.backward(pulls[0], q, *own, into.lse, delta, piece, buffers, implementation="triton")
        d_k[:, part.to(k.device)], d_v[:, part.to(k.device)] = of_keys - HELD, of_values - HELD
    # One rounding, as a single call has.
    return [into.out.to(q.dtype), into.lse, *(t.to(q.dtype) for t in (d_q, d_k, d_v))]


def _others(tile: Tile, inputs: Sequence[Tensor], pulls: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The peer's results, and the truth's."""
    q, k, v = inputs
    some = reference(q, k, v, tile)[1] != -math.inf
    pulls = [pulls[0], torch.where(some, pulls[1], 0)]
    peers = results(partial(formula, tile=tile), inputs, pulls)
    return peers, results(partial(reference, tile=tile), [t.double() for t in inputs], [t.double() for t in pulls])


def formula(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """The peer: attention's formula in plain torch, every step in the dtype of the inputs; blind rows as ours."""
    shown, group = seen(tile, q.shape[2], k.shape[2], q.device), q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
    scores = (torch.einsum("bihd,bjhd->bhij", q, k) * tile.scale).masked_fill(~shown, -math.inf)
    blind = ~shown.any(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    lse = scores.float().masked_fill(blind, 0).logsumexp(-1).masked_fill(blind[..., 0], -math.inf)
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse
