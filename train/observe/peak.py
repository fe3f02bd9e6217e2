"""What a device could do at best: the denominator of MFU, and the memory that a rank took.

Imports torch only inside the functions that need it.
"""

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

BF16, FP16, FP32 = "bfloat16", "float16", "float32"
TERA = 1e12
MEASURED_SECONDS = 0.1


def _tensor(half: float, single: float | None = None) -> dict[str, float]:
    """Peaks of a device whose bfloat16 and float16 run alike, in units of 1e12 operations per second."""
    return {BF16: half, FP16: half} | ({FP32: single} if single else {})


# Pattern of the device's name (lower case) -> published peak in 1e12 operations per second: dense (vendors like to
# print the figure for 2:4 sparsity, which is twice that), with float32 accumulation; float32 without TF32.
# Sources: NVIDIA's data sheets and architecture white papers, AMD's data sheets of the Instinct cards. That of the
# MI250X is for one of its two dies, which is what torch calls a device.
PUBLISHED: tuple[tuple[str, dict[str, float]], ...] = (
    (r"\bgb[23]00\b", _tensor(2500)),
    (r"\bb[23]00\b", _tensor(2250)),
    (r"\bgh200\b", _tensor(989, 67)),
    (r"\bh200 nvl\b", _tensor(835, 60)),
    (r"\bh200\b", _tensor(989, 67)),
    (r"\bh100 nvl\b", _tensor(835, 60)),
    (r"\bh100\b.*\b(pcie|hbm2e)\b", _tensor(756, 51)),
    (r"\bh100\b.*\b(sxm\d?|hbm3)\b", _tensor(989, 67)),
    (r"\bh800\b(?!.*pcie)", _tensor(989, 67)),
    (r"\bh20\b", _tensor(148, 44)),
    (r"\ba[18]00\b", _tensor(312, 19.5)),
    (r"\ba40\b", _tensor(149.7, 37.4)),
    (r"\ba30\b", _tensor(165, 10.3)),
    (r"\ba10g\b", _tensor(70, 35)),
    (r"\ba10\b", _tensor(125, 31.2)),
    (r"\bl40s\b", _tensor(362, 91.6)),
    (r"\bl40\b", _tensor(181, 90.5)),
    (r"\bl4\b", _tensor(121, 30.3)),
    (r"\brtx 6000 ada\b", _tensor(364, 91.1)),
    (r"\brtx a6000\b", _tensor(154.8, 38.7)),
    (r"\brtx 5090$", _tensor(209.5, 104.8)),
    (r"\brtx 4090$", _tensor(165.2, 82.6)),
    (r"\brtx 3090$", _tensor(71, 35.6)),
    (r"\bv100s\b", {FP16: 130, FP32: 16.4}),
    (r"\bv100\b.*\bsxm\d?\b", {FP16: 125, FP32: 15.7}),
    (r"\bv100\b.*\bpcie\b", {FP16: 112, FP32: 14}),
    (r"\bt4\b", {FP16: 65, FP32: 8.1}),
    (r"\bmi355x\b", _tensor(2516, 157.3)),
    (r"\bmi350x\b", _tensor(2309, 144.2)),
    (r"\bmi3(00|25)x\b", _tensor(1307, 163.4)),
    (r"\bmi300a\b", _tensor(980.6, 122.6)),
    (r"\bmi250x\b", _tensor(191.5)),
    (r"\bmi210\b", _tensor(181)),
)


def peak_flops(
    device_type: str, device_name: str, dtype: object, meet: Callable[[], object] = lambda: None
) -> tuple[float | None, str]:
    """Floating-point operations per second that one device could do at best, and where the figure comes from.

    `dtype` is that of the matrix products, a torch dtype or its name. A CPU is measured here and now, in less than a
    second: all ranks call, and `meet` waits for all of them before the clock starts, so that each measures its share of
    the machine. Of a GPU that the table does not know (or a MIG slice of one) the figure is None: then MFU is left out
    rather than guessed.
    """
    name = str(dtype).removeprefix("torch.")
    if device_type == "cpu":
        return measured_cpu_flops(name, meet), f"measured at the start of the run: {name} matrix products on this CPU"
    words = device_name.lower()
    if re.search(r"\bmig\b", words):
        return None, f"no peak is published for a MIG slice ({device_name})"
    peaks = next((peaks for pattern, peaks in PUBLISHED if re.search(pattern, words)), {})
    if name not in peaks:
        return None, f"no published {name} peak is known for {device_name}"
    return peaks[name] * TERA, f"published dense {name} peak of {device_name}"


def measured_cpu_flops(dtype: str, meet: Callable[[], object] = lambda: None) -> float:
    """Rate of square matrix products in `dtype` with the threads that torch has now, averaged over MEASURED_SECONDS.

    The mean and not the best, so that what other ranks take away at the same time counts; `meet` is called once the
    matrices are ready.
    """
    import torch

    def matrices(size: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.ones(size, size, dtype=getattr(torch, dtype)) for _ in range(3))

    def product_seconds(size: int) -> float:
        left, right, out = matrices(size)
        torch.mm(left, right, out=out)
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        return time.perf_counter() - start

    size = 256
    while size < 2048 and product_seconds(size) < 2e-3:
        size *= 2
    left, right, out = matrices(size)
    meet()
    products, start = 0, time.perf_counter()
    while products == 0 or time.perf_counter() - start < MEASURED_SECONDS:
        torch.mm(left, right, out=out)
        products += 1
    return products * 2 * size**3 / (time.perf_counter() - start)


def peak_memory_gib(device_type: str) -> float:
    """The most memory, in GiB, that this process took so far: of the GPU as torch allocated it, else of the machine."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    try:
        # Not getrusage, whose figure a process inherits from the one that started it.
        held = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        held = None
    if held:
        return int(held[1]) / 2**20
    import resource

    # macOS counts in bytes, other systems in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
