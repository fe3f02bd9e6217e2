"""Compiles a Triton kernel for a GPU that need not be there, and reads from the result what would make it slow or fail.

Triton carries its own compilers: ptxas for NVIDIA, LLVM for AMD. What they report here is what a launch would load.
"""

import re
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from armillary.kernels.specimen import Specimen

KIB = 1024


@dataclass(frozen=True)
class Device:
    """What a kernel compiled for one architecture may use."""

    backend: str
    name: int | str
    warp_size: int
    shared_limit: int
    """Bytes of shared memory that one block can have."""
    tensor_cores: tuple[str, ...]
    """Instructions of which at least one must appear where a specimen is said to use tensor cores."""


DEVICES = {
    "sm_80": Device("cuda", 80, 32, 163 * KIB, ("mma",)),
    "sm_90": Device("cuda", 90, 32, 227 * KIB, ("wgmma",)),
    "sm_100": Device("cuda", 100, 32, 227 * KIB, ("tcgen05", "mma")),
    "sm_120": Device("cuda", 120, 32, 99 * KIB, ("mma",)),
    "gfx942": Device("hip", "gfx942", 64, 64 * KIB, ("mfma",)),
    "gfx950": Device("hip", "gfx950", 64, 160 * KIB, ("mfma",)),
}

PRODUCTS = {
    "mma": r"\bmma\.sync\.",
    "wgmma": r"\bwgmma\.mma_async\.",
    "tcgen05": r"\btcgen05\.mma\.",
    "mfma": r"\bv_mfma_",
}
"""Instructions of tensor cores as they stand in PTX and in AMD's assembly."""

TENSOR_MEMORY_COLUMNS = 512
"""Of Blackwell's tensor memory, for one block."""


@dataclass(frozen=True)
class Usage:
    """What one thread of a compiled kernel takes."""

    registers: int
    stack: int
    """Bytes of memory, whether the compiler ran out of registers or a local array needs it."""
    spills: int
    """NVIDIA: bytes of local memory. AMD: vector registers spilled.

    AMD's spilled scalar registers go into lanes of vector registers. Where they go to memory, `stack` shows them.
    """


@dataclass(frozen=True)
class Row:
    """One specimen on one architecture."""

    name: str
    architecture: str
    seconds: float = 0.0
    usage: Usage | None = None
    shared: int = 0
    """Bytes of shared memory of one block."""
    warps: int = 0
    products: dict[str, int] = field(default_factory=dict)
    """How many instructions of each kind of tensor core."""
    failures: tuple[str, ...] = ()


def parse_cuda(text: str) -> Usage:
    """Reads the report of `cuobjdump -res-usage` on a cubin with one kernel."""
    found = re.findall(r"\bREG:(\d+) STACK:(\d+) .*?\bLOCAL:(\d+)", text)
    if not found:
        raise ValueError(f"cuobjdump told no registers: {text.strip() or 'nothing'}")
    registers, stack, local = (max(int(value) for value in column) for column in zip(*found, strict=True))
    return Usage(registers, stack, local)


def parse_amd(text: str) -> Usage:
    """Reads the metadata at the end of AMD's assembly of one kernel."""

    def value(name: str) -> int:
        found = re.findall(rf"^[ -]+\.{name}:\s+(\d+)\s*$", text, re.MULTILINE)
        if not found:
            raise ValueError(f"no .{name} in the assembly's metadata")
        return max(map(int, found))

    return Usage(value("vgpr_count"), value("private_segment_fixed_size"), value("vgpr_spill_count"))


def parse_products(text: str) -> dict[str, int]:
    """Counts the instructions of tensor cores in PTX or AMD's assembly; kinds that do not appear are left out."""
    counts = {kind: len(re.findall(pattern, text)) for kind, pattern in PRODUCTS.items()}
    return {kind: count for kind, count in counts.items() if count}


def judge(device: Device, usage: Usage, shared: int, products: dict[str, int], tensor_cores: bool) -> tuple[str, ...]:
    """What is wrong with a compiled kernel; nothing if it may be shipped."""
    found = []
    if usage.stack:
        found.append(f"{usage.stack} bytes of stack")
    if usage.spills:
        found.append(f"spills: {usage.spills}")
    if shared > device.shared_limit:
        found.append(f"{shared} bytes of shared memory; a block has {device.shared_limit}")
    if tensor_cores and not products.keys() & set(device.tensor_cores):
        found.append(f"no {' or '.join(device.tensor_cores)}")
    return tuple(found)


def compile_specimen(specimen: Specimen, architecture: str) -> Row:
    """Compiles one kernel and judges it. What the compiler refuses is a row with a failure, not an error."""
    device = DEVICES[architecture]
    began = time.perf_counter()
    try:
        compiled = _compile(specimen, device)
        elapsed = time.perf_counter() - began
        text = compiled.asm["ptx" if device.backend == "cuda" else "amdgcn"]
        usage = parse_cuda(_cuobjdump(compiled.asm["cubin"])) if device.backend == "cuda" else parse_amd(text)
    except Exception as error:  # Triton raises what its stages raise, of many types
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        failure = ": ".join([type(error).__name__, *lines[-3:]])[:500]
        return Row(specimen.name, architecture, time.perf_counter() - began, failures=(failure,))
    shared, products = int(compiled.metadata.shared), parse_products(text)
    failures = judge(device, usage, shared, products, specimen.tensor_cores)
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    if columns > TENSOR_MEMORY_COLUMNS:
        failures += (f"{columns} columns of tensor memory; a block has {TENSOR_MEMORY_COLUMNS}",)
    return Row(
        specimen.name, architecture, elapsed, usage, shared, int(compiled.metadata.num_warps), products, failures
    )


def _compile(specimen: Specimen, device: Device) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants = signature_of(specimen)
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind[0] in "iu" and kind != "i1" and name not in specimen.unaligned)
    }
    options = {"num_warps": specimen.num_warps, "num_stages": specimen.num_stages, "enable_fp_fusion": True}
    if specimen.max_registers is not None and device.backend == "cuda":
        options["maxnreg"] = specimen.max_registers
    return triton.compile(
        ASTSource(specimen.kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget(device.backend, device.name, device.warp_size),
        options=options,
    )


def signature_of(specimen: Specimen) -> tuple[dict[str, str], dict[str, Any]]:
    """Type and value of the kernel's arguments, in its order; constants left out take their default.

    Raises:
        ValueError: if the specimen lacks an argument, or has one that the kernel lacks.
    """
    names = list(specimen.kernel.arg_names)
    defaults = {p.name: p.default for p in specimen.kernel.params if p.is_constexpr and p.has_default}
    constants = defaults | dict(specimen.constants)
    given = constants.keys() | specimen.signature.keys()
    if missing := [name for name in names if name not in given]:
        raise ValueError(f"specimen {specimen.name} lacks {', '.join(missing)}")
    if unknown := sorted(given - set(names)):
        raise ValueError(f"specimen {specimen.name} has {', '.join(unknown)}; the kernel has not")
    return {n: "constexpr" if n in constants else specimen.signature[n] for n in names}, constants


def _cuobjdump(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
