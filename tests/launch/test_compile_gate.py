"""The compile gate passes what may be shipped, and fails each thing that may not, on compiled kernels."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from armillary.kernels.specimen import ARCHITECTURES, Specimen
from armillary.launch import compile_gate
from armillary.launch.compiled import (
    DEVICES,
    Device,
    Usage,
    judge,
    parse_amd,
    parse_cuda,
    parse_products,
    signature_of,
)

TESTS = Path(__file__).parent.parent

CUOBJDUMP = """
Resource usage:
 Common:
  GLOBAL:11 CONSTANT[4]:8
 Function dkdv_kernel:
  REG:255 STACK:176 SHARED:1024 LOCAL:0 CONSTANT[0]:1008 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

AMDGCN = """
	v_mfma_f32_32x32x8_bf16 v[0:15], v[64:65], v[70:71], v[0:15]
	v_mfma_f32_32x32x8_bf16 v[16:31], v[64:65], v[72:73], v[16:31]
		.amdhsa_private_segment_fixed_size 596
	.amdgpu_metadata
---
amdhsa.kernels:
  - .agpr_count:     0
    .args:
      - .address_space:  global
        .offset:         0
    .group_segment_fixed_size: 0
    .name:           dkdv_kernel
    .private_segment_fixed_size: 596
    .sgpr_count:     106
    .sgpr_spill_count: 2
    .vgpr_count:     256
    .vgpr_spill_count: 213
...
	.end_amdgpu_metadata
"""


def gate(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "armillary.launch.compile_gate", *arguments]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), str(TESTS)]))
    # Under pytest TRITON_INTERPRET is set. The gate must see to it that its own process compiles all the same.
    environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return done.returncode, done.stdout + done.stderr


def test_cuobjdump_is_read() -> None:
    assert parse_cuda(CUOBJDUMP) == Usage(registers=255, stack=176, spills=0)
    second = CUOBJDUMP + CUOBJDUMP.replace("176", "8").replace("LOCAL:0", "LOCAL:24")
    assert parse_cuda(second) == Usage(registers=255, stack=176, spills=24)


def test_the_assembly_of_amd_is_read() -> None:
    assert parse_amd(AMDGCN) == Usage(registers=256, stack=596, spills=213)


@pytest.mark.parametrize("missing", ["vgpr_count", "private_segment_fixed_size", "vgpr_spill_count"])
def test_nothing_passes_by_being_unreadable(missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        parse_amd(AMDGCN.replace(f" .{missing}:", " .other:"))
    with pytest.raises(ValueError, match="cuobjdump"):
        parse_cuda("Resource usage:\n Common:\n  GLOBAL:11")


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        (AMDGCN, {"mfma": 2}),
        ("wgmma.fence.sync.aligned;\n wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}", {"wgmma": 1}),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }", {"mma": 1}),
        ("@%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r1 ], %rd1; tcgen05.commit.cta_group::1", {"tcgen05": 1}),
        ("fma.rn.f32 %f1, %f2, %f3, %f4;", {}),
    ],
)
def test_products_are_counted(text: str, counts: dict[str, int]) -> None:
    assert parse_products(text) == counts


@pytest.mark.parametrize(
    ("usage", "shared", "products", "expected"),
    [
        (Usage(255, 0, 0), 1000, {"wgmma": 1}, ""),
        (Usage(255, 8, 0), 1000, {"wgmma": 1}, "8 bytes of stack"),
        (Usage(255, 0, 4), 1000, {"wgmma": 1}, "spills: 4"),
        (Usage(255, 0, 0), 1001, {"wgmma": 1}, "1001 bytes of shared memory; a block has 1000"),
        (Usage(255, 0, 0), 1000, {"mma": 9}, "no wgmma"),
    ],
)
def test_verdicts(usage: Usage, shared: int, products: dict[str, int], expected: str) -> None:
    device = Device("cuda", 90, 32, 1000, ("wgmma",))
    assert "; ".join(judge(device, usage, shared, products, tensor_cores=True)) == expected


def test_limits() -> None:
    assert set(DEVICES) == set(ARCHITECTURES)
    kibibytes = {name: device.shared_limit / 1024 for name, device in DEVICES.items()}
    assert kibibytes == {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64, "gfx950": 160}


def parameter(name: str, **default: Any) -> SimpleNamespace:
    return SimpleNamespace(
        name=name, is_constexpr=bool(default), has_default=bool(default), **{"default": None} | default
    )


def test_a_specimen_must_fit_its_kernel() -> None:
    names = ["x", "size", "BLOCK", "EVEN"]
    kernel = SimpleNamespace(arg_names=names, params=[*map(parameter, names[:3]), parameter("EVEN", default=False)])
    fitting = Specimen("a", kernel, {"size": "i32", "x": "*bf16"}, {"BLOCK": 8})
    signature, constants = signature_of(fitting)
    assert list(signature.items()) == [("x", "*bf16"), ("size", "i32"), ("BLOCK", "constexpr"), ("EVEN", "constexpr")]
    assert constants == {"BLOCK": 8, "EVEN": False}
    with pytest.raises(ValueError, match="specimen b lacks BLOCK"):
        signature_of(Specimen("b", kernel, {"size": "i32", "x": "*bf16"}, {}))
    with pytest.raises(ValueError, match="specimen c has strid; the kernel has not"):
        signature_of(Specimen("c", kernel, {"size": "i32", "x": "*bf16", "strid": "i32"}, {"BLOCK": 8}))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, dict[tuple[str, str], dict[str, Any]]]:
    pytest.importorskip("triton")
    file = tmp_path_factory.mktemp("gate") / "rows.json"
    code, output = gate("--module", "planted_kernels", "--arch", "sm_90", "--arch", "gfx942", "--json", str(file))
    result = json.loads(file.read_text())
    assert result["triton"]
    return code, output, {(row["name"], row["architecture"]): row for row in result["rows"]}


def test_the_gate_fails_if_one_does(planted: Any) -> None:
    code, output, rows = planted
    assert code == 1
    assert len(rows) == 14
    assert "4 passed, 10 failed" in output


@pytest.mark.parametrize(("architecture", "kind"), [("sm_90", "wgmma"), ("gfx942", "mfma")])
def test_what_may_be_shipped_passes(planted: Any, architecture: str, kind: str) -> None:
    for name in ("good", "product"):
        row = planted[2][name, architecture]
        assert row["failures"] == []
        assert row["usage"]["registers"] > 8
        assert row["warps"] == 4
    assert planted[2]["product", architecture]["products"][kind] > 0
    assert planted[2]["product", architecture]["shared"] > 0


@pytest.mark.parametrize(
    ("name", "architecture", "failure"),
    [
        ("spilling", "sm_90", "bytes of stack"),
        ("large", "sm_90", "262144 bytes of shared memory; a block has 232448"),
        ("large", "gfx942", "262144 bytes of shared memory; a block has 65536"),
        ("large", "gfx942", "bytes of stack"),
        ("large", "gfx942", "spills: "),
        ("without_a_dot", "sm_90", "no wgmma"),
        ("without_a_dot", "gfx942", "no mfma"),
        ("forbidden", "sm_90", "the block is too small"),
        ("forbidden", "gfx942", "the block is too small"),
        ("incomplete", "gfx942", "lacks length"),
    ],
)
def test_what_may_not_fails(planted: Any, name: str, architecture: str, failure: str) -> None:
    assert any(failure in found for found in planted[2][name, architecture]["failures"])


def test_a_compiler_that_dies_is_a_failure_of_its_kernel_alone(planted: Any) -> None:
    assert planted[2]["aborting", "sm_90"]["failures"] == ["the compiler ended its process"]


def test_nothing_to_compile_is_no_success() -> None:
    pytest.importorskip("triton")
    assert gate("--module", "planted_kernels", "--only", "nothing of that name")[0] == 2


@pytest.fixture(scope="module")
def shipped() -> dict[str, Specimen]:
    pytest.importorskip("triton")
    return compile_gate.collect(tuple(compile_gate.shipped_modules()))


def test_no_kernel_is_forgotten(shipped: dict[str, Specimen]) -> None:
    """Every jitted function that no other calls is launched from Python, so it needs a specimen."""
    jitted, called = set(), set()
    for path in (TESTS.parent / "kernels").glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                jitted.add((path.stem, node.name))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                called.add(node.func.id)
    assert {(module, name) for module, name in jitted if name not in called} == set(map(kernel_of, shipped.values()))


def kernel_of(specimen: Specimen) -> tuple[str, str]:
    return specimen.kernel.fn.__module__.rpartition(".")[2], specimen.kernel.fn.__name__


def test_every_specimen_names_every_argument(shipped: dict[str, Specimen]) -> None:
    known = {name for specimen in shipped.values() for name in specimen.signature}
    for specimen in shipped.values():
        assert set(specimen.kernel.arg_names) == specimen.signature.keys() | specimen.constants.keys(), specimen.name
        assert specimen.unaligned <= known, specimen.name


SAMPLE = (
    r"attention_\w+_d64_strided_bf16_(?!into)|norm_\w+_128_bf16|rope_128_bf16|merge_\w+_128_bf16|swiglu_\w+_bf16|"
    r"cross_entropy_\w+_bf16_1024|(accumulate|quantise)_int8_128_bf16|requantise_int4_128_seeded"
)
"""Of each kernel one specimen or two; all of them: `make gate`."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sample_of_what_is_shipped_passes(shipped: dict[str, Specimen]) -> None:
    """Every kernel on every GPU; what Triton has compiled before it takes from its cache, which knows its versions."""
    chosen = [specimen for name, specimen in shipped.items() if re.search(SAMPLE, name)]
    found = {(kernel_of(specimen), gpu) for specimen in chosen for gpu in specimen.architectures}
    assert found == {(kernel_of(specimen), gpu) for specimen in shipped.values() for gpu in ARCHITECTURES}
    code, output = gate("--only", SAMPLE, "--cache", str(TESTS.parent / ".cache/compiled"))
    assert code == 0, output
    assert f"{sum(len(specimen.architectures) for specimen in chosen)} passed, 0 failed" in output
