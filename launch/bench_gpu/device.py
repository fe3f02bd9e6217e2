"""What the card is and how fast it copies, multiplies and reads its L2 cache: the ceilings of all other rows."""

import os
import shutil
import subprocess

import torch

from armillary.launch.bench_gpu.sections import Job
from armillary.launch.bench_gpu.timing import Setting, copy_bandwidth, measure
from armillary.launch.rows import Row

QUERIES = (
    "name,driver_version,vbios_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,"
    "temperature.gpu,ecc.mode.current,clocks_throttle_reasons.active,mig.mode.current"
)


def jobs(setting: Setting) -> list[Job]:
    return [
        ("device", lambda: [_device(setting)]),
        ("copy bandwidth", lambda: [_copy(setting)]),
        ("bf16 product", lambda: [_product(setting)]),
        ("L2 read bandwidth", lambda: [_l2(setting)]),
    ]


def _device(setting: Setting) -> Row:
    row: Row = {"name": "device", "torch": torch.__version__, "cuda": torch.version.cuda, "smi": _smi()}
    row["cudnn"] = torch.backends.cudnn.version()
    row["path"] = {name: shutil.which(name) or "" for name in ("ncu", "nvidia-smi", "gcc")}
    if not setting.dry:
        facts = torch.cuda.get_device_properties(0)
        row |= {
            "device": facts.name,
            "capability": f"sm_{facts.major}{facts.minor}",
            "multiprocessors": facts.multi_processor_count,
            "memory_bytes": facts.total_memory,
            "l2_bytes": getattr(facts, "L2_cache_size", 0),
        }
    return row | {"note": f"{os.cpu_count()} processors of the host"}


def _smi() -> dict[str, str]:
    """What nvidia-smi says, while the card is busy or not; a sentence where it is missing or refuses."""
    if shutil.which("nvidia-smi") is None:
        return {"error": "nvidia-smi is not installed"}
    found = {}
    for query in QUERIES.split(","):
        # One at a time: versions differ in what they know, and one unknown name would lose all others.
        command = ["nvidia-smi", "--id=0", f"--query-gpu={query}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
        found[query] = (done.stdout or done.stderr).strip().splitlines()[0] if (done.stdout or done.stderr) else ""
    return found


def _copy(setting: Setting) -> Row:
    bandwidth = copy_bandwidth(setting)
    size = 2 << 30 if not setting.dry else 2 << 16
    return _bandwidth_row("copy bandwidth", size, bandwidth, "a copy of 1 GiB, bytes read and written")


def _product(setting: Setting) -> Row:
    size = 8192 if not setting.dry else 64
    left, right = (torch.randn(size, size, device=setting.device).to(setting.narrow) for _ in range(2))
    seconds = measure({"mm": lambda: left @ right}, setting).seconds["mm"]
    note = f"{size} x {size} x {size}, {str(setting.narrow).removeprefix('torch.')}"
    return {"name": "bf16 product", "seconds": seconds, "tflops": 2 * size**3 / seconds / 1e12, "note": note}


def _l2(setting: Setting) -> Row:
    from armillary.launch.bench_gpu.l2 import read_many_times

    size, passes = (16 << 20, 100) if not setting.dry else (1 << 16, 2)
    data = torch.ones(size // 4, device=setting.device)
    seconds = measure({"read": lambda: read_many_times(data, passes)}, setting).seconds["read"]
    told = f"16 MiB read {passes} times by all multiprocessors, past their own caches"
    return _bandwidth_row("L2 read bandwidth", size * passes, size * passes / seconds, told)


def _bandwidth_row(name: str, size: int, bandwidth: float, note: str) -> Row:
    return {"name": name, "seconds": size / bandwidth, "bytes": size, "gb_per_s": bandwidth / 1e9, "note": note}
