"""bfloat16 by value in Triton's CPU interpreter, for tests of kernels on machines without a GPU.

The interpreter holds bfloat16 as 16 raw bits and computes on them as if they were integers (triton issue 11584, closed
without a fix), and narrows float32 by cutting bits off where a GPU rounds to the nearest even. `install()` mends both,
and loop bounds given at run time, which triton 3.6 cannot take from numpy 2.4 and newer. So the source that a test
runs is the source that a GPU runs. Holds for triton 3.6 to 3.9.

A test module of kernels calls `install()` below its imports. tests/conftest.py has set TRITON_INTERPRET by then.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from armillary.launch.bench_gpu.dry import mend_loop_bounds

COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 as uint16 bits -> the same values as float32."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 as uint16 bits, rounded to the nearest even; every NaN becomes 0x7FC0, as in torch."""
    values = np.asarray(values, dtype=np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


@functools.cache
def install() -> None:
    """Patches the interpreter, once a process. Skips the calling test module where triton is not installed.

    Does nothing where TRITON_INTERPRET is not 1: kernels run on a GPU there.
    """
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    patch_arithmetic(interpreter)
    patch_products(interpreter)
    patch_casts(interpreter)
    patch_reductions(interpreter)
    mend_loop_bounds()
    patch_calls(interpreter)
    # Checks each sum of integers for overflow, in 64 bits: half the time, and no test is large enough to overflow.
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)


def is_bf16(handle: Any) -> bool:
    import triton.language as tl

    return handle.dtype.scalar == tl.bfloat16


def by_value(interpreter: Any, operator: Callable[..., Any], handles: tuple[Any, ...]) -> Any:
    """A numpy operator on bfloat16 handles: computed in float32, rounded once; comparisons give int1."""
    import triton.language as tl

    result = operator(*(widen(handle.data) for handle in handles))
    if operator in COMPARISONS:
        return interpreter.TensorHandle(result, tl.int1)
    return interpreter.TensorHandle(narrow(result), tl.bfloat16)


def patch_arithmetic(interpreter: Any) -> None:
    """Elementwise operators. `np.where` is left as it is: moving bits is right."""
    builder = interpreter.InterpreterBuilder
    unary, binary, ternary = builder.unary_op, builder.binary_op, builder.ternary_op

    def unary_op(self: Any, x: Any, op: Any) -> Any:
        return by_value(interpreter, op, (x,)) if is_bf16(x) else unary(self, x, op)

    def binary_op(self: Any, x: Any, y: Any, op: Any) -> Any:
        return by_value(interpreter, op, (x, y)) if is_bf16(x) else binary(self, x, y, op)

    def ternary_op(self: Any, x: Any, y: Any, z: Any, op: Any) -> Any:
        return by_value(interpreter, op, (x, y, z)) if is_bf16(x) else ternary(self, x, y, z, op)

    builder.unary_op, builder.binary_op, builder.ternary_op = unary_op, binary_op, ternary_op


def patch_products(interpreter: Any) -> None:
    """`tl.fma`, and `tl.dot` with its float32 accumulator."""
    import triton.language as tl

    builder = interpreter.InterpreterBuilder
    dot, fma = builder.create_dot, builder.create_fma

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = (interpreter.TensorHandle(widen(x.data), tl.float32) if is_bf16(x) else x for x in (a, b))
        return dot(self, *wide, *rest)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if not is_bf16(x):
            return fma(self, x, y, z)
        # The product of two bfloat16 is exact in float64, so that the sum alone is rounded.
        exact = widen(x.data).astype(np.float64) * widen(y.data) + widen(z.data)
        return interpreter.TensorHandle(narrow(exact), tl.bfloat16)

    builder.create_dot, builder.create_fma = create_dot, create_fma


def patch_casts(interpreter: Any) -> None:
    """Casts between bfloat16 and any other type, by way of float32; constants."""
    import triton.language as tl

    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        before, after = source.dtype.scalar, target.scalar
        if before == after or tl.bfloat16 not in (before, after):
            return cast(self, source, target)
        if after == tl.bfloat16:
            return interpreter.TensorHandle(narrow(source.data), tl.bfloat16)
        wide = interpreter.TensorHandle(widen(source.data), tl.float32)
        return wide if after == tl.float32 else cast(self, wide, target)

    def get_bf16(self: Any, value: float) -> Any:
        return interpreter.TensorHandle(narrow(np.array([value])), tl.bfloat16)

    # Constants: triton 3.6 has none in bfloat16.
    builder.cast_impl, builder.get_bf16 = cast_impl, get_bf16


def patch_reductions(interpreter: Any) -> None:
    """Reductions and scans run in float32 and round their result once. A GPU may round at every step."""
    import triton.language as tl

    operation = interpreter.ReduceScanOpInterface
    apply_any = operation.apply

    def convert(tensor: Any, change: Callable[[np.ndarray], np.ndarray], dtype: Any) -> Any:
        handle = interpreter.TensorHandle(change(tensor.handle.data), dtype)
        return tl.tensor(handle, tl.block_type(dtype, list(tensor.shape)) if tensor.type.is_block() else dtype)

    def apply(self: Any, inputs: Any) -> Any:
        if not isinstance(inputs, tuple):
            return self.apply((inputs,))[0]
        raw = [tensor.dtype == tl.bfloat16 for tensor in inputs]
        wide = (convert(x, widen, tl.float32) if bf16 else x for x, bf16 in zip(inputs, raw, strict=True))
        results = apply_any(self, tuple(wide))
        return tuple(convert(x, narrow, tl.bfloat16) if bf16 else x for x, bf16 in zip(results, raw, strict=True))

    operation.apply = apply


def patch_calls(interpreter: Any) -> None:
    """A kernel's calls of other jitted functions: upstream walks through all of triton.language at each, a third of the
    time of a small kernel. A launch has made the language ready, and what a function's first call added stays."""
    function = interpreter.InterpretedFunction
    call, ready = function.__call__, set()

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn in ready:
            return self.rewrite()(*args, **kwargs)
        ready.add(self.fn)
        return call(self, *args, **kwargs)

    function.__call__ = __call__
