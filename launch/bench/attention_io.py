"""`armillary bench attention --io`: what each attention kernel moves with its shipped block sizes; nothing is run."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from armillary.kernels.attention.configs import block_config
from armillary.kernels.attention.mask import Mask
from armillary.kernels.attention.places import Places
from armillary.kernels.attention.tiles import Tile
from armillary.kernels.attention.traffic import FLOP, Sizes, Traffic, meter
from armillary.launch.bench_gpu.ncu import measured_bytes, refuse_without_profiler
from armillary.launch.rows import Row, print_table

ARCHITECTURE = "sm_90"
"""An H100, whose block sizes and shared memory the meter takes."""
HEADER = ["kernel", "tile", "MiB L2", "GFLOP", "FLOP/B", "tiles", "of", "MiB DRAM", "rho LB", "rho sched"]
NUMBERS = [field.name for field in fields(Mask) if field.name != "causal"]


@dataclass(frozen=True)
class Case:
    """One attention call of bfloat16."""

    lengths: tuple[int, ...]
    """Of the documents of the one row."""
    mask: Mask
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 128

    @property
    def name(self) -> str:
        documents = f"{len(self.lengths)} documents, " if len(self.lengths) > 1 else ""
        heads = f"{self.heads} heads, {self.kv_heads} key heads, head_dim {self.head_dim}"
        return f"{sum(self.lengths)} tokens, {documents}{heads}, {text_of(self.mask)}"

    def tile(self) -> Tile:
        places = Places.packed([self.lengths])
        return Tile(places, places, self.mask, 1.0)


CASES = (
    Case((8192,), Mask(causal=False)),
    Case((8192,), Mask()),
    Case((8192,), Mask(), head_dim=64),
    Case((8192,), Mask(window=1024, sinks=64, block=64)),
    Case((8192,), Mask(window=1024, sinks=64, block=64, stride=8, shift=1)),
    Case((3000, 1000, 96, 4096), Mask()),
)
"""Metered when nothing is asked for."""


def parse_mask(text: str) -> Mask:
    """ "causal" or "full", then numbers: "causal,window=4096,sinks=64,block=64,stride=8".

    Raises:
        ValueError: if there is no such word or number, or the numbers contradict each other.
    """
    numbers: dict[str, int] = {}
    causal = True
    for part in (part.strip() for part in text.split(",")):
        name, _, value = part.partition("=")
        if part in ("causal", "full"):
            causal = part == "causal"
        elif name in NUMBERS and value.isdecimal():
            numbers[name] = int(value)
        else:
            raise ValueError(f"--mask: {part!r}; allowed are causal or full, and {'=N, '.join(NUMBERS)}=N")
    return Mask(causal, **numbers)


def text_of(mask: Mask) -> str:
    """What `parse_mask` reads."""
    kept = [name for name in NUMBERS if getattr(mask, name) != getattr(Mask(), name)]
    return ",".join(["causal" if mask.causal else "full", *(f"{name}={getattr(mask, name)}" for name in kept)])


def parse_documents(text: str, seq: int | None) -> tuple[int, ...]:
    """Lengths of the documents of a row: a list such as "1000,3000", or the name of a file of numbers.

    Raises:
        ValueError: if it is neither, or a length is 0, or they do not sum to `seq` where that is given.
        OSError: if the file cannot be read.
    """
    listed = re.fullmatch(r"[\d\s,]+", text)
    numbers = re.split(r"[\s,]+", (text if listed else Path(text).read_text()).strip(" \n,"))
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise ValueError(f"--documents {text}: give lengths of 1 or more, such as 1000,3000, or a file of them")
    lengths = tuple(map(int, numbers))
    if seq is not None and seq != sum(lengths):
        raise ValueError(f"--documents: their lengths sum to {sum(lengths)}, but --seq is {seq}; leave --seq out")
    return lengths


def cases(
    seq: int | None, head_dim: int | None, heads: int | None, kv_heads: int | None, mask: str, documents: str
) -> Sequence[Case]:
    """The one case that the options describe, or the shipped set where there are none.

    Raises:
        ValueError: if an option is no good.
    """
    if not (seq or head_dim or heads or kv_heads or mask or documents):
        return CASES
    lengths = parse_documents(documents, seq) if documents else (seq or 8192,)
    heads = heads or (Case.heads if Case.heads % (kv_heads or 1) == 0 else kv_heads) or Case.heads
    kv_heads = kv_heads or (Case.kv_heads if heads % Case.kv_heads == 0 else heads)
    if heads % kv_heads:
        raise ValueError(f"--heads {heads} is not a multiple of --kv-heads {kv_heads}")
    if head_dim is not None and head_dim > 256:
        raise ValueError(f"--head-dim {head_dim}: the kernels, and so the table of block sizes, end at 256")
    return [Case(lengths, parse_mask(mask or "causal"), heads, kv_heads, head_dim or Case.head_dim)]


def print_io(cases: Sequence[Case], measure: bool = False) -> list[Row]:
    """Meters each case, prints a table, and returns a row for each kernel; with `measure` also what a GPU counted."""
    if measure:
        refuse_without_profiler()
    rows: list[Row] = []
    for case in cases:
        print(f"{case.name}:")
        found = list(metered(case))
        counted = [measured_bytes(case, each.kernel) if measure and each.kernel in FLOP else {} for _, each in found]
        header = HEADER + (["measured MiB DRAM", "measured MiB L2"] if measure else [])
        lines = [_line(block, each) for block, each in found]
        if measure:
            for line, bytes_of in zip(lines, counted, strict=True):
                line += [_mebibytes(bytes_of.get(name)) for name in ("dram_bytes", "l2_bytes")]
        print_table([header, *lines])
        print()
        rows += [_row(case, block, each, more) for (block, each), more in zip(found, counted, strict=True)]
    return rows


def metered(case: Case) -> Iterator[tuple[tuple[int, int] | None, Traffic]]:
    """Queries and keys a tile, and the traffic, of each kernel with its shipped block sizes."""
    configs = {kernel: block_config(kernel, case.head_dim, torch.bfloat16, ARCHITECTURE) for kernel in FLOP}
    blocks = {kernel: (config.queries, config.keys) for kernel, config in configs.items()}
    for each in meter(case.tile(), Sizes(case.heads, case.kv_heads, case.head_dim), blocks):
        yield blocks.get(each.kernel), each


def _line(block: tuple[int, int] | None, each: Traffic) -> list[str]:
    return [
        each.kernel,
        f"{block[0]}x{block[1]}" if block else "",
        _mebibytes(each.bytes),
        f"{each.flop / 1e9:.1f}",
        f"{each.intensity:.1f}",
        *([str(each.tiles), str(each.all_tiles)] if block else ["", ""]),
        _mebibytes(each.compulsory),
        f"{each.rho_lb:.1f}" if each.least else "",
        f"{each.rho_sched:.1f}" if each.schedule else "",
    ]


def _mebibytes(number: int | None) -> str:
    return "" if number is None else f"{number / 2**20:.1f}"


def _row(case: Case, block: tuple[int, int] | None, each: Traffic, counted: dict[str, int]) -> Row:
    """`ratio` is bytes between L2 and the processors by the compulsory bytes of DRAM."""
    return {
        "name": f"{each.kernel}: {case.name}",
        "seconds": 0.0,
        "ratio": each.bytes / each.compulsory,
        "bytes": each.bytes,
        "simulated": True,
        "kernel": each.kernel,
        "tile": block,
        "flop": each.flop,
        "flop_per_byte": each.intensity,
        "tiles": each.tiles,
        "all_tiles": each.all_tiles,
        "compulsory_bytes": each.compulsory,
        "rho_lb": each.rho_lb,
        "rho_sched": each.rho_sched,
        **{f"measured_{name}": number for name, number in counted.items()},
    }
