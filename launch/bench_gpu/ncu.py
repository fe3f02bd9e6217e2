"""What a GPU counts while one attention kernel runs: bytes of DRAM and of L2, by NVIDIA's profiler `ncu`.

`python -m armillary.launch.bench_gpu.ncu KERNEL CASE` is the process that is profiled: it runs one kernel once.
"""

import csv
import io
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from armillary.launch.bench.attention_io import Case

METRICS = {"dram__bytes.sum": "dram_bytes", "lts__t_bytes.sum": "l2_bytes"}


def measured_bytes(case: "Case", kernel: str) -> dict[str, int]:
    """`dram_bytes` and `l2_bytes` of one run of `kernel` with cold caches.

    Raises:
        ValueError: if ncu cannot count.
    """
    command = ["ncu", "--csv", "--print-units", "base", "--metrics", ",".join(METRICS), "--launch-count", "1"]
    command += ["--kernel-name", f"regex:^{kernel}_kernel", sys.executable, "-m", "armillary.launch.bench_gpu.ncu"]
    done = subprocess.run([*command, kernel, json.dumps(asdict(case))], capture_output=True, text=True, check=False)
    found = parse(done.stdout) if done.returncode == 0 else {}
    if len(found) < len(METRICS):
        last = (done.stdout + done.stderr).strip().splitlines()[-1:]
        raise ValueError(f"bench attention --io --measure: ncu counted nothing: {''.join(last)}")
    return found


def refuse_without_profiler() -> None:
    """Raises ValueError where nothing can be measured."""
    import torch

    missing = []
    if not torch.cuda.is_available() or torch.version.hip:
        missing.append("an NVIDIA GPU")
    if shutil.which("ncu") is None:
        missing.append("the command ncu of NVIDIA Nsight Compute")
    if missing:
        raise ValueError(
            f"bench attention --io --measure: measuring needs {' and '.join(missing)}, not found here; leave --measure "
            "out for the meter alone"
        )


def parse(text: str) -> dict[str, int]:
    """The metrics in the CSV of ncu, which follows what the program prints."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if '"Metric Name"' in line), len(lines))
    found = {}
    for line in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        if (name := METRICS.get(line["Metric Name"] or "")) is not None:
            found[name] = round(float(line["Metric Value"].replace(",", "")))
    return found


def run_once(kernel: str, case: "Case", device: str = "cuda", implementation: str = "triton") -> None:
    """One run of a kernel on random bfloat16 tensors; before those of the backward, the forward runs too."""
    import torch

    from armillary.kernels.attention import call as attention

    generator = torch.Generator(device).manual_seed(0)
    seq, shape = sum(case.lengths), (case.heads, case.kv_heads, case.kv_heads)
    q, k, v = (
        torch.randn(1, seq, h, case.head_dim, dtype=torch.bfloat16, device=device, generator=generator) for h in shape
    )
    tile = case.tile()
    out, lse = attention.forward(q, k, v, tile, implementation=implementation)
    if kernel != "forward":
        attention.backward(q, q, k, v, lse, attention.row_dots(out, q, lse), tile, implementation=implementation)
    if device == "cuda":
        torch.cuda.synchronize()


def main(kernel: str, text: str) -> None:
    """The process that is profiled."""
    from armillary.kernels.attention.mask import Mask
    from armillary.launch.bench.attention_io import Case

    described = json.loads(text)
    run_once(kernel, Case(**described | {"mask": Mask(**described["mask"]), "lengths": tuple(described["lengths"])}))


if __name__ == "__main__":
    main(*sys.argv[1:])
