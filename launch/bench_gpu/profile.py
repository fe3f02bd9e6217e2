"""What ncu counts while attention's kernels run: bytes of DRAM and L2, beside the meter's; or why there is none."""

import shutil
from functools import partial

from armillary.launch.bench.attention_io import CASES, Case, metered
from armillary.launch.bench_gpu.sections import Job
from armillary.launch.bench_gpu.timing import Setting
from armillary.launch.rows import Row


def jobs(setting: Setting) -> list[Job]:
    if shutil.which("ncu") is None or setting.dry:
        why = "a dry run profiles nothing" if setting.dry else "ncu of NVIDIA Nsight Compute is not installed"
        return [("ncu", lambda: [{"name": "ncu", "unavailable": why, "note": why, "error": why, "ok": True}])]
    wanted = [(CASES[1], kernel) for kernel in ("forward", "query_gradient", "key_gradient")] + [(CASES[0], "forward")]
    return [(f"{kernel}: {case.name}", partial(_rows, case, kernel)) for case, kernel in wanted]


def _rows(case: Case, kernel: str) -> list[Row]:
    from armillary.launch.bench_gpu.ncu import measured_bytes

    name = f"{kernel}: {case.name}"
    each = next(traffic for _, traffic in metered(case) if traffic.kernel == kernel)
    known = {"bytes": each.bytes, "compulsory_bytes": each.compulsory}
    try:
        counted = measured_bytes(case, kernel)
    except ValueError as error:
        # A container may not let it count: that is no fault of the kernels.
        return [{"name": name, **known, "unavailable": str(error), "error": str(error), "ok": True}]
    ratio = counted["dram_bytes"] / each.compulsory
    return [{"name": name, **known, "ratio": ratio, **counted, "note": "ratio: bytes of DRAM by the compulsory ones"}]
