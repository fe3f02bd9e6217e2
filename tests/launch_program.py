"""The process of tests/kernels/test_launch_path.py: launches every Triton kernel on a driver that is none.

`prove` compiles each for sm_90; `count` compiles nothing, and counts what a GPU would have to compile as the sizes of
batches change. Prints one line of JSON.
"""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_cuda
import torch
import triton.compiler
from torch import Tensor
from triton.runtime.jit import JITFunction

from armillary.kernels import cross_entropy_triton, norm_triton, quantise_triton, rope_triton, swiglu_triton
from armillary.kernels.attention import flash_triton, merge_triton
from armillary.kernels.attention.configs import BlockConfig
from armillary.kernels.attention.mask import Mask
from armillary.kernels.attention.places import Places
from armillary.kernels.attention.tiles import Tile
from armillary.kernels.quantise import FORMATS, payload_bytes
from armillary.kernels.vocab_shard import VocabShard

KERNELS = Path(flash_triton.__file__).parent.parent
BF16, FP32 = torch.bfloat16, torch.float32
HEADS, KV_HEADS = 4, 2
SMALL = BlockConfig(16, 16, 4, 2)
"""Compiled in a second; the shipped ones are the compile gate's."""
MASKS = (Mask(), Mask(False), Mask(window=16), Mask(window=16, sinks=16, block=16, stride=4, shift=1))


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def attend(
    queries: Places, keys: Places | None = None, mask: Mask = MASKS[0], into: bool = False, first_head: int = 0,
    head_dim: int = 16, dtype: torch.dtype = BF16,
) -> None:  # fmt: skip
    """Forward and backward; with `into`, folded into and added to what is there."""
    keys = queries if keys is None else keys
    tile = Tile(queries, keys, mask, 0.25, first_head)
    q = empty(queries.batch, queries.seq, HEADS, head_dim, dtype=dtype)
    k, v = (empty(keys.batch, keys.seq, KV_HEADS, head_dim, dtype=dtype) for _ in range(2))
    out, lse = torch.zeros(q.shape, dtype=FP32 if into else dtype), torch.zeros(q.shape[0], HEADS, q.shape[1])
    d_q, d_k, d_v = (torch.zeros(t.shape, dtype=FP32 if into else dtype) for t in (q, k, v))
    flash_triton.forward(q, k, v, tile, out, lse, into, SMALL)
    flash_triton.backward(q, q, k, v, lse, lse, tile, (d_q, d_k, d_v), (into,) * 3, (SMALL, SMALL))


def norm(*shape: int) -> None:
    x, weight = empty(*shape, 64), empty(64)
    for residual in (None, x):
        _, total, inverse = norm_triton.forward(x, residual, weight, 1e-5)
        norm_triton.backward(total, weight, inverse, x, residual)


def rope(batch: int, seq: int, tables: int = 1) -> None:
    q, k = empty(batch, seq, HEADS, 32), empty(batch, seq, KV_HEADS, 32)
    table = empty(tables, seq, 1, 16, dtype=FP32)
    for back in (False, True):
        rope_triton.turn(q, k, table, table, back)


def swiglu(*shape: int) -> None:
    x = empty(*shape)
    swiglu_triton.forward(x, x)
    swiglu_triton.backward(x, x, x)


def cross_entropy(rows: int, vocab: int = 1000, z_loss: float = 0.0) -> None:
    buffer, labels = empty(rows, -(-vocab // 64) * 64), torch.zeros(rows, dtype=torch.int64)
    for slope in (False, True):
        cross_entropy_triton.softmax_rows(buffer, vocab, labels, z_loss, slope)
    shard = VocabShard(vocab, vocab, lambda t: t, lambda t: t)
    cross_entropy_triton.sharded_softmax_rows(buffer, vocab, labels, shard, z_loss, True)


def merge(batch: int, seq: int, of: int | None = None) -> None:
    """`of`: the seq of a longer tensor that the result is a stretch of."""
    out, part = empty(batch, of or seq, HEADS, 32, dtype=FP32)[:, :seq], empty(batch, seq, HEADS, 32)
    lse, other = empty(batch, HEADS, of or seq, dtype=FP32)[..., :seq], empty(batch, HEADS, seq, dtype=FP32)
    merge_triton.forward(out, lse, part, other, out, lse)
    merge_triton.backward(part, other, other, other, part, part, (BF16, BF16))
    merge_triton.backward(part, None, other, other, None, None, (BF16, BF16))


def quantise(size: int, ranks: int = 4, offset: int = 0, stream: tuple[int, int] | None = None) -> None:
    for format in FORMATS:
        payloads = empty(ranks, payload_bytes(size, format), dtype=torch.uint8)
        quantise_triton.quantise(empty(size, dtype=FP32), payloads[0], format, 128, stream, offset)
        quantise_triton.accumulate(payloads, empty(size, dtype=FP32), format, 128)
        quantise_triton.requantise(payloads, payloads[0].clone(), format, 128, stream, offset)


def prove() -> None:
    """Each kernel with each of its flags."""
    for mask in MASKS:
        attend(Places.packed([[20, 1, 12]]), mask=mask)
    attend(Places.packed([[20, 1, 12]]), mask=MASKS[-1], into=True)
    attend(Places.in_order(2, 40), mask=MASKS[0], head_dim=24, dtype=FP32)
    norm(3, 17)
    rope(2, 9)
    swiglu(3, 50)
    cross_entropy(5, z_loss=1e-4)
    merge(2, 9)
    quantise(1000)
    quantise(1000, stream=(-5, 7))


SEQS, BATCHES = (1, 2, 16, 33, 48, 100, 128, 777), (1, 2, 3, 16, 17)


def lengths_of_attention() -> None:
    for seq in SEQS:
        for batch in BATCHES:
            attend(Places.in_order(batch, seq))


def tiles_of_attention() -> None:
    """What changes from tile to tile and from batch to batch at one length: nothing is compiled for it."""
    plain = Places.in_order(1, 64)
    for start in (0, 1, 16, 64, 1000, 2**20):
        for step in (1, 2, 16):
            attend(plain, Places.in_order(1, 64, start, step))
    for count in (1, 2, 3, 16, 33):
        attend(Places.packed([[1] * (count - 1) + [65 - count]]))


def masks_of_attention() -> None:
    for window in (1, 2, 16, 100, 4096):
        for first_head in (0, 1, 3, 16):
            attend(Places.in_order(1, 64), mask=Mask(window=window), first_head=first_head)
    for sinks, stride, shift in ((0, 1, 0), (16, 2, 1), (32, 16, 3), (64, 128, 16)):
        attend(Places.in_order(1, 64), mask=Mask(window=64, sinks=sinks, block=16, stride=stride, shift=shift))


def sizes(call: Callable[..., None]) -> Callable[[], None]:
    def run() -> None:
        for seq in SEQS:
            for batch in BATCHES:
                call(batch, seq)

    return run


def rows_of_logits() -> None:
    for rows in SEQS:
        for z_loss in (0.0, 1.0, 1e-4):
            cross_entropy(rows, z_loss=z_loss)


def stretches() -> None:
    for seq in SEQS:
        merge(2, seq, of=1000)


def payloads() -> None:
    for size in (100, 128, 4096, 5000, 2**17, 2**17 + 1):
        for ranks in (1, 2, 4, 16):
            for offset, stream in ((0, None), (1, (1, 1)), (128, (16, -3)), (2**40, (-(2**31), 2**31 - 1))):
                quantise(size, ranks, offset, stream)


SCENARIOS: dict[str, Callable[[], None]] = {
    "attention: lengths and batches": lengths_of_attention,
    "attention: tiles and documents": tiles_of_attention,
    "attention: masks and heads": masks_of_attention,
    "norm: rows": sizes(norm),
    "rope: lengths and batches": sizes(rope),
    "swiglu: rows": sizes(lambda batch, seq: swiglu(batch, seq, 3)),
    "cross entropy: rows": rows_of_logits,
    "merge: lengths and batches": sizes(merge),
    "merge: stretches": stretches,
    "quantise: sizes, ranks, seeds": payloads,
}


def kernels() -> dict[str, JITFunction[Any]]:
    """Every kernel that was launched, by name."""
    found = {}
    for path in KERNELS.glob("**/*.py"):
        name = ".".join(path.relative_to(KERNELS).with_suffix("").parts)
        module = importlib.import_module(f"armillary.kernels.{name}")
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and value.__module__ == module.__name__ and value.device_caches:
                found[f"{path.stem}.{name}"] = value
    return found


def count() -> dict[str, dict[str, int]]:
    """Compilations by scenario and kernel, of the set of constants that has most of them."""
    result = {}
    for name, run in SCENARIOS.items():
        for kernel in kernels().values():
            kernel.device_caches.clear()
        run()
        result[name] = {key: most_of_one(kernel) for key, kernel in kernels().items() if kernel.device_caches[0][0]}
    return result


def most_of_one(kernel: JITFunction[Any]) -> int:
    """Compilations of one set of constants and types of pointers."""
    groups: dict[str, int] = {}
    for compiled in kernel.device_caches[0][0].values():
        groups[compiled.group] = groups.get(compiled.group, 0) + 1
    return max(groups.values())


def nothing_compiled(source: Any, **_: Any) -> Any:
    """Stands for triton.compile."""
    integers = {n for n, kind in source.signature.items() if kind[0] in "iu" or kind == "constexpr"}
    own = {p.name for p in source.fn.params if p.is_constexpr}
    names = source.fn.arg_names
    constants = {names[path[0]]: value for path, value in source.constants.items() if names[path[0]] in own}
    pointers = {name: kind for name, kind in source.signature.items() if name not in integers}
    group = repr((sorted(constants.items()), sorted(pointers.items())))
    nothing = lambda *arguments: None  # noqa: E731
    return SimpleNamespace(group=group, launch_metadata=nothing, run=nothing, function=0, packed_metadata=())


def main(what: str) -> None:
    driver = fake_cuda.install()
    if what == "prove":
        prove()
        launched = sorted({launch.name for launch in driver.launches})
        integers = [len(launch.values) for launch in driver.launches]
        told = {"launched": launched, "launches": len(driver.launches), "arguments": sum(integers)}
        print(json.dumps({"triton": triton.__version__, **told, "kernels": sorted(kernels())}))
    else:
        triton.compiler.compile = nothing_compiled
        print(json.dumps({"triton": triton.__version__, "compilations": count()}))


if __name__ == "__main__":
    main(sys.argv[1])
