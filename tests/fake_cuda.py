"""A CUDA driver that is none, so that kernels are launched as on a GPU on a machine without one.

All of Triton's launch is real up to the driver's library: a call's arguments are bound, specialised and compiled for
sm_90, and Triton's own launcher takes them apart. Where it would call the library, the stand-in does what the C code
does to each argument, keeps it, and returns. Holds for triton 3.6 to 3.9. Only in a process where TRITON_INTERPRET is
not set: `install()` before a kernel is launched.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget

SHARED = 227 * 1024
RANGES = {"i1": (-1, 1), "u1": (0, 1)} | {
    f"{kind}{bits}": ((-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if kind == "i" else (0, 2**bits - 1))
    for kind in "iu"
    for bits in (8, 16, 32, 64)
}


@dataclass
class Launch:
    """What the library would have been given."""

    name: str
    grid: tuple[int, int, int]
    types: list[str]
    values: list[Any]


@dataclass
class Driver:
    """What `triton.runtime.driver.active` is asked for."""

    launches: list[Launch] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    """Of compiled kernels by their handle."""

    def __post_init__(self) -> None:
        from triton.backends.nvidia import driver as nvidia

        self.launcher_cls = nvidia.CudaLauncher
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED, "multiprocessor_count": 132},
            load_binary=self.load_binary,
            launch=self.launch,
            build_signature_metadata=list,
        )
        # From 3.7 on the launcher describes arguments by these, which the C code brings along.
        nvidia.PyKernelArg, nvidia.ARG_CONSTEXPR, nvidia.ARG_KERNEL, nvidia.ARG_TUPLE = SimpleNamespace, 0, 1, 2
        # 3.6 writes a C module for each kernel instead, whose `launch` takes all arguments.
        nvidia.library_dirs = list
        nvidia.compile_module_from_src = lambda **_: SimpleNamespace(launch=self.launch_of_36)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        assert len(binary) > 0
        self.names.append(name)
        return len(self.names), len(self.names) - 1, 255, 0, 1024

    def launch(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        *_, annotations, types, values = rest
        flat = list(kept(annotations, values))
        self.keep(function, (x, y, z), types, flat)

    def launch_of_36(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        # Cooperative grid, dependent launch, two scratch buffers, two kinds of metadata and two hooks come first.
        self.keep(function, (x, y, z), [], list(rest[8:]))

    def keep(self, function: int, grid: tuple[int, int, int], types: list[str], values: list[Any]) -> None:
        assert all(isinstance(size, int) and 0 < size < 2**31 for size in grid), grid
        if types:
            for kind, value in zip(types, values, strict=True):
                check(kind, value)
        self.launches.append(Launch(self.names[function], grid, types, values))


def kept(annotations: Any, values: Any) -> Any:
    """The arguments that are no constants, out of their tuples."""
    assert len(annotations) == len(values)
    for annotation, value in zip(annotations, values, strict=True):
        if annotation.type == 2:
            yield from kept(annotation.nested_tuple, value)
        elif annotation.type == 1:
            yield value


def check(kind: str, value: Any) -> None:
    """Fails where the C code would."""
    if kind.startswith("*"):
        assert value is None or isinstance(value.data_ptr(), int), (kind, value)
    elif kind in RANGES:
        low, high = RANGES[kind]
        assert low <= int(value) <= high, (kind, value)
    else:
        assert isinstance(value, float | int), (kind, value)


def install() -> Driver:
    """Makes one the active driver."""
    from triton.runtime import driver

    fake = Driver()
    driver.set_active(fake)
    return fake
