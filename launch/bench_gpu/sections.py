"""What `armillary bench gpu` does on one card, section by section, and how each is run in a process of its own.

A kernel that reads where it may not ends the process that launched it, and one that never ends must be killed: so no
section runs in the process that writes the result. `python -m armillary.launch.bench_gpu.sections` is such a process.
"""

import argparse
import gc
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from armillary.launch.rows import Row

BROKEN = 70
"""Exit code of a process that lost its card."""
Job = tuple[str, Callable[[], list[Row]]]
"""A name, and what measures or checks it."""


@dataclass(frozen=True)
class Section:
    """One of the parts that are asked for by name."""

    name: str
    """As it is asked for; its module has the same name and `jobs(setting) -> list[Job]`."""
    seconds: float
    """Most that it may take."""
    parts: int = 1
    """Processes that share its jobs on one card at once; more than one only where nothing is timed."""
    prepared: bool = False
    """Whether many processes compile its kernels before they are timed."""

    @property
    def module(self) -> str:
        return self.name.replace(" ", "_")


SECTIONS = (
    Section("device", 40),
    Section("correctness", 150, parts=6),
    Section("layer correctness", 90, parts=2),
    Section("attention", 130, prepared=True),
    Section("layers", 80, prepared=True),
    Section("candidates", 70, prepared=True),
    Section("profile", 50),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the share `--part i/n` of the jobs of sections and adds a line of JSON to `--out` for each row."""
    parser = argparse.ArgumentParser(prog="python -m armillary.launch.bench_gpu.sections", description=__doc__)
    parser.add_argument("section", nargs="+", choices=[section.name for section in SECTIONS])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--first", type=int, default=0, help="jobs before this one are left out")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--prepare", action="store_true")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.seconds
    share, parts = map(int, options.part.split("/"))
    from armillary.launch.bench_gpu.timing import Setting, warm_up

    setting = Setting(options.dry_run, options.repetitions, options.prepare)
    make_ready(setting.dry)
    number = 0
    with open(options.out, "a") as file:
        for section in (section for section in SECTIONS if section.name in options.section):
            jobs = importlib.import_module(f"armillary.launch.bench_gpu.{section.module}").jobs(setting)[share::parts]
            if section.parts == 1:
                warm_up(setting)
            for name, job in jobs:
                number += 1
                if number <= options.first:
                    continue
                _write(file, {"job": number, "name": name, "section": section.name})
                for row in run_job(name, job, deadline):
                    row = complete(row, section.name, setting.dry)
                    _write(file, finite(row))
                    if not setting.prepare:
                        print(f"{section.name}: {line(row)}", flush=True)
                if not usable(setting.dry):
                    return BROKEN
                gc.collect()
    return 0


def _write(file: TextIO, value: Row) -> None:
    file.write(json.dumps(value) + "\n")
    file.flush()


def usable(dry: bool) -> bool:
    """Whether this process can still use its card: after a kernel that read where it may not, none can."""
    import torch

    try:
        if not dry:
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def make_ready(dry: bool) -> None:
    """Options of torch, and in a dry run of the interpreter, that the comparisons need."""
    import torch

    torch.manual_seed(0)
    # The gradients of compiled peers are taken many times from one forward pass.
    with suppress(ImportError, AttributeError):
        setattr(importlib.import_module("torch._functorch.config"), "donated_buffer", False)  # noqa: B010
    if dry:
        from armillary.launch.bench_gpu.dry import mend_loop_bounds

        mend_loop_bounds()


def run_job(name: str, job: Callable[[], list[Row]], deadline: float) -> list[Row]:
    """Its rows; where it raises, or there is no time left, one row that says so."""
    from armillary.launch.bench_gpu.timing import error_text

    if time.monotonic() > deadline:
        return [{"name": name, "ok": False, "error": "not run: the time of the section was up"}]
    try:
        return job()
    except Exception as error:  # whatever it is, the other jobs go on, and the row tells
        return [{"name": name, "ok": False, "error": error_text(error)}]


def complete(row: Row, section: str, dry: bool) -> Row:
    """With all keys that a row of a benchmark has. What has an error was not measured."""
    measured = not dry and "error" not in row
    empty = {"seconds": 0.0, "ratio": 0.0, "bytes": 0, "note": "", "ok": True}
    return {"section": section, **empty, "measured": measured, **({"dry": True} if dry else {}), **row}


def finite(value: Any) -> Any:
    """With None in place of numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def line(row: Row) -> str:
    """One line for a person."""
    told = [row["name"]]
    if row["seconds"]:
        told.append(f"{row['seconds'] * 1e3:.3f} ms")
    if row["ratio"]:
        told.append(f"ratio {row['ratio']:.2f}")
    told += [f"{row[key]:.0f} {unit}" for key, unit in (("tflops", "TFLOP/s"), ("gb_per_s", "GB/s")) if key in row]
    if "target" in row:
        told.append(f"target {row['target']}: {'reached' if row['reached'] else 'MISSED'}")
    told.append(row.get("error") or row["note"])
    return ("" if row["ok"] else "FAILED ") + "  ".join(filter(None, told))


if __name__ == "__main__":
    sys.exit(main())
