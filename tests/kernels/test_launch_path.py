"""Kernels launched as on a GPU, on a driver that is none: arguments fit, and other sizes compile nothing new.

The interpreter binds no arguments and specialises nothing; the compile gate writes signatures by hand. So this runs
Triton's own launch, up to the driver's library (tests/fake_cuda.py), in a process without TRITON_INTERPRET.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from armillary.launch import compile_gate

TESTS = Path(__file__).parent.parent

COMPILATIONS = {
    # log-sum-exps lie (batch, heads, seq): whether seq, and heads * seq, are 1 or multiples of 16.
    "attention: lengths and batches": {
        "flash_forward.forward_kernel": 4,
        "flash_query_gradient.query_gradient_kernel": 4,
        "flash_key_gradient.key_gradient_kernel": 4,
    },
    "attention: tiles and documents": {
        "flash_forward.forward_kernel": 1,
        "flash_query_gradient.query_gradient_kernel": 1,
        "flash_key_gradient.key_gradient_kernel": 1,
    },
    "attention: masks and heads": {
        "flash_forward.forward_kernel": 1,
        "flash_query_gradient.query_gradient_kernel": 1,
        "flash_key_gradient.key_gradient_kernel": 1,
    },
    "norm: rows": {"norm_triton._forward_kernel": 1, "norm_triton._backward_kernel": 1},
    # Strides of a head's tokens, where there is one token only.
    "rope: lengths and batches": {"rope_triton._kernel": 3},
    # Whether all numbers together are a multiple of 16, which makes loads wide.
    "swiglu: rows": {"swiglu_triton._forward_kernel": 2, "swiglu_triton._backward_kernel": 2},
    # Three results are rows of one tensor: where the second and third begin.
    "cross entropy: rows": {
        "cross_entropy_triton._rows_kernel": 1,
        "cross_entropy_triton._statistics_kernel": 3,
        "cross_entropy_triton._slope_kernel": 1,
    },
    # As attention's.
    "merge: lengths and batches": {"merge_triton._forward_kernel": 4, "merge_triton._backward_kernel": 1},
    "merge: stretches": {"merge_triton._forward_kernel": 4, "merge_triton._backward_kernel": 1},
    # Whether sizes are multiples of 16, and offsets fit 32 bits; strides of payloads, where scales begin.
    "quantise: sizes, ranks, seeds": {
        "quantise_triton.quantise_kernel": 4,
        "quantise_triton.accumulate_kernel": 4,
        "quantise_triton.requantise_kernel": 6,
    },
}
"""Most compilations of one kernel with one set of constants and dtypes, over all sizes of a scenario."""


def program(what: str, cache: Path) -> dict[str, Any]:
    """What tests/launch_program.py prints; `cache` is Triton's."""
    pytest.importorskip("triton")
    environment = {
        key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "ARMILLARY_KERNELS")
    }
    paths = [os.environ.get("PYTHONPATH", ""), str(TESTS), str(TESTS.parent / ".pkg")]
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, str(TESTS / "launch_program.py"), what]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_kernel_is_launched() -> None:
    """Compiled from its launcher's own arguments, which the driver's library would take."""
    result = program("prove", TESTS.parent / ".cache/compiled")
    shipped = compile_gate.collect(tuple(compile_gate.shipped_modules())).values()
    names = {f"{each.kernel.fn.__module__.rpartition('.')[2]}.{each.kernel.fn.__name__}" for each in shipped}
    assert set(result["kernels"]) == names
    assert set(result["launched"]) == {name.rpartition(".")[2] for name in names}
    assert result["arguments"] > 10 * result["launches"] > 10 * len(names)


def test_other_sizes_compile_nothing_new(tmp_path: Path) -> None:
    """Beyond what is known when a number is 1 or a multiple of 16; every kernel is in some scenario."""
    found = program("count", tmp_path)["compilations"]
    assert {name: counts.keys() for name, counts in found.items()} == {
        name: counts.keys() for name, counts in COMPILATIONS.items()
    }
    more = {
        (scenario, kernel): number
        for scenario, counts in found.items()
        for kernel, number in counts.items()
        if number > COMPILATIONS[scenario][kernel]
    }
    assert not more


def test_the_stand_in_refuses_what_the_library_would() -> None:
    pytest.importorskip("triton")
    import fake_cuda

    fake_cuda.check("i32", 2**31 - 1)
    fake_cuda.check("*bf16", SimpleNamespace(data_ptr=lambda: 0))
    fake_cuda.check("fp32", 0.5)
    for kind, value in (("i32", 2**31), ("u8", -1), ("fp32", "0.5")):
        with pytest.raises(AssertionError):
            fake_cuda.check(kind, value)
    with pytest.raises(AttributeError):
        fake_cuda.check("*bf16", 3)
    leaf, constant = SimpleNamespace(type=1), SimpleNamespace(type=0)
    both = SimpleNamespace(type=2, nested_tuple=[leaf, constant])
    assert list(fake_cuda.kept([leaf, both, constant], [1, (2, 3), 4])) == [1, 2]
