"""Mistakes planted in the attention kernels: the fuzz's own check must find each one in a handful of calls."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import interpreter
import pytest
import torch
from attention_fuzz import Case, check

from armillary.kernels.attention.configs import BlockConfig
from armillary.kernels.attention.mask import Mask
from armillary.kernels.attention.places import Places
from armillary.kernels.attention.tiles import Tile

interpreter.install()
from armillary.kernels.attention import flash_triton  # noqa: E402

KERNELS = Path(flash_triton.__file__).parent
FILES = (
    "flash_triton",
    "flash_forward",
    "flash_key_gradient",
    "flash_query_gradient",
    "flash_ranges",
)

MUTANTS = {
    "causal mask one key too wide": ("flash_ranges", "high = index_of(positions + 1, run)", "high = index_of(positions + 2, run)"),
    "causal mask one query short": ("flash_ranges", "low = index_of(positions, run)", "low = index_of(positions + 1, run)"),
    "right edge left out": ("flash_ranges", "low, high = last, end\n", "low, high = end, end\n"),
    "left edge left out": ("flash_ranges", "low, high = begin, tl.minimum(first, end)", "low, high = begin, begin"),
    "window one block short": ("flash_ranges", "low = index_of((block - limits[0] + 1) * rule.block, run)", "low = index_of((block - limits[0] + 2) * rule.block, run)"),
    "edges taken for the middle": ("flash_ranges", "tl.cdiv(tl.maximum(full_begin - begin, 0), SIZE) * SIZE", "tl.maximum(full_begin - begin, 0) // SIZE * SIZE"),
    "sinks forgotten": ("flash_ranges", "    far = positions < limits[1]\n", "    far = positions < 0\n"),
    "sinks left out": ("flash_ranges", "low, high = begin * 0, tl.minimum(index_of(limits[1], run), begin)", "low, high = begin, begin"),
    "strides shifted": ("flash_ranges", "(number + shift) % stride) % stride", "(number + shift + 1) % stride) % stride"),
    "last strided block left out": ("flash_ranges", "edge = tl.cdiv(run[0] + begin * run[1], rule.block)", "edge = (run[0] + begin * run[1]) // rule.block - 1"),
    "steps taken for 1": ("flash_ranges", "tl.load(entry + 3), tl.load(entry + 1))", "tl.load(entry + 3) * 0 + 1, tl.load(entry + 1))"),
    "scale": ("flash_triton", "tile.scale * LOG2E", "tile.scale * LOG2E * 1.02"),
    "scale of dq": ("flash_query_gradient", "store_gradient(dq_tile, dq * scale", "store_gradient(dq_tile, dq"),
    "scale of dk": ("flash_key_gradient", "(dk * scale).to", "dk.to"),
    "old maximum not decayed": ("flash_forward", "acc = acc * decay[:, None]", "acc = acc * 1.0"),
    "log-sum-exp in base 2": ("flash_forward", "* LN2), mask=valid)", "* 1.0), mask=valid)"),
    "blind rows not 0": ("flash_forward", 'tl.where(new_m == float("-inf"), 0.0, new_m)', "new_m"),
    "partial result not taken in": ("flash_forward", "tl.where(none, 0.0, 1.0)", "tl.where(none, 0.0, 0.0)"),
    "delta forgotten for queries": ("flash_query_gradient", "+ slope_offset[:, None])", "+ 0.0 * slope_offset[:, None])"),
    "delta's sign": ("flash_triton", "slope_offset = delta.neg().contiguous()", "slope_offset = delta.contiguous()"),
    "log-sum-exp unscaled": ("flash_triton", "lse * (-1 / tile.scale)", "-lse"),
    "one query head of a group": ("flash_key_gradient", "kv_head * group + group,", "kv_head * group + 1,"),
    "wrong key head": ("flash_forward", "kv_head = head // group", "kv_head = head * 0"),
    "buffers overwritten": ("flash_query_gradient", "    if ADD:\n", "    if ADD and False:\n"),
    "buffer of keys overwritten": ("flash_key_gradient", "    if ADD:\n", "    if ADD and False:\n"),
    "other heads of a long row": ("flash_key_gradient", "head * offset_head + start", "head * offset_head"),
}  # fmt: skip


def handful() -> Iterator[Case]:
    """Few calls that meet every branch: offsets, steps, documents, groups, all kinds of mask, blind rows, buffers. Those
    that find most mistakes come first."""
    ring = Tile(Places.in_order(1, 37, 20), Places.in_order(1, 41, 3), Mask(), 0.3)
    ahead = Tile(Places.in_order(1, 20, 5), Places.in_order(1, 20, 12), Mask(), 0.3)
    striped = Tile(Places.in_order(1, 35, 2, 3), Places.in_order(1, 35, 1, 3), Mask(), 0.3)
    packed = Places.packed([[19, 7, 21]] * 2)
    long = Places.in_order(1, 90)
    window = Tile(long, long, Mask(window=24), 0.3)
    band = Tile(packed, packed, Mask(causal=False, window=6), 0.3)
    strided = Tile(long, long, Mask(window=16, block=4, sinks=4, stride=3, shift=1), 0.3, 1)
    tiles = [ring, ahead, striped, Tile(packed, packed, Mask(), 0.3), window, band, strided]
    for index, tile in reversed(list(enumerate(tiles))):
        kv_heads, group = (2, 2) if tile.queries is packed else (1, 1 + index % 2)
        for into in (False, True) if index < 2 else (index % 2 == 0,):
            yield Case(tile, kv_heads, group, 16, BlockConfig(16, 16, 4, 2), into, index)


def load(folder: Path, name: str, old: str = "", new: str = "") -> ModuleType:
    """`flash_triton` of a copy of the kernels, in which `old` in file `name` is `new`."""
    folder.mkdir()
    for file in FILES:
        text = (KERNELS / f"{file}.py").read_text()
        if file == name:
            assert text.count(old) >= 1, f"{old!r} is not in {file}.py any more: plant the mistake anew"
            text = text.replace(old, new)
        for other in FILES:
            text = text.replace(f"armillary.kernels.attention.{other} ", f"{folder.name}_{other} ")
        (folder / f"{folder.name}_{file}.py").write_text(text)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(f"{folder.name}_flash_triton")
    finally:
        sys.path.remove(str(folder))


def check_all(module: ModuleType) -> None:
    for case in handful():
        check(case, torch.float32, module)


def test_the_copy_is_sound(tmp_path: Path) -> None:
    check_all(load(tmp_path / "sound", "flash_forward"))


@pytest.mark.parametrize("name", MUTANTS)
def test_each_mistake_is_found(name: str, tmp_path: Path) -> None:
    module = load(tmp_path / f"mutant{list(MUTANTS).index(name)}", *MUTANTS[name])
    with pytest.raises(AssertionError):
        check_all(module)
