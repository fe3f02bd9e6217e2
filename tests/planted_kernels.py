"""Kernels for the compile gate's test: one that may be shipped, and one for each thing that is wrong with a kernel.

Imported by the gate itself, in a process of its own: what is imported under pytest runs in the interpreter.
"""

import os

import triton
import triton.language as tl

from armillary.kernels.specimen import Specimen


@triton.jit
def scale(x, out, length, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < length, other=0.0).to(tl.float32)
    tl.store(out + at, values / tl.sum(values, axis=0), mask=at < length)


@triton.jit
def square(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    values = tl.load(x + row[:, None] * COLUMNS + column[None, :])
    tl.store(out + row[:, None] * ROWS + row[None, :], tl.dot(values, tl.trans(values)).to(tl.bfloat16))


@triton.jit
def forbidden(x, out, length, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK > 1024, "the block is too small")


class Abort(dict):
    """Ends the process that compiles it, as an assertion inside the compiler does."""

    def keys(self):
        os.abort()


def specimens() -> list[Specimen]:
    vector = {"x": "*bf16", "out": "*bf16", "length": "i32"}
    matrix = {"x": "*bf16", "out": "*bf16"}
    tile = {"ROWS": 64, "COLUMNS": 64}
    return [
        Specimen("good", scale, vector, {"BLOCK": 1024}, unaligned=frozenset({"length"})),
        Specimen("product", square, matrix, tile, tensor_cores=True),
        Specimen("spilling", scale, vector, {"BLOCK": 16384}, num_warps=1, architectures=("sm_90",)),
        Specimen("large", square, matrix, {"ROWS": 128, "COLUMNS": 1024}, num_warps=8, tensor_cores=True),
        Specimen("without_a_dot", scale, vector, {"BLOCK": 1024}, tensor_cores=True),
        Specimen("forbidden", forbidden, vector, {"BLOCK": 1024}),
        Specimen("incomplete", scale, matrix, {"BLOCK": 1024}),
        Specimen("aborting", scale, Abort(vector), {"BLOCK": 1024}, architectures=("sm_90",)),
    ]
