"""`armillary bench gpu`: everything that one CUDA card can tell about the kernels, in under nine minutes, in one file.

`python -m armillary.launch bench gpu` is the same on a machine with torch, triton and numpy alone, without typer.
"""

import argparse
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from armillary.launch.bench_gpu.processes import Process, run_together
from armillary.launch.bench_gpu.report import NOTES, print_summary
from armillary.launch.bench_gpu.sections import SECTIONS, Section
from armillary.launch.rows import Row, commit
from armillary.train.files import write_json

SECONDS = 530.0
"""Of the whole command, most."""
SIDE_BY_SIDE = 170.0
"""Of the sections that are checked while others are compiled."""
FOLDER = Path("docs/benchmarks")


@dataclass
class Run:
    """What is known so far, and how it is gone about."""

    dry: bool
    repetitions: int
    save: Callable[["Run"], None]
    folder: Path
    compiled: bool = False
    rows: list[Row] = field(default_factory=list)
    sections: list[dict[str, Any]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return SECONDS - (time.monotonic() - self.began)


def rows(repetitions: int) -> list[Row]:
    """All rows on this machine's GPU; nothing is written."""
    return measure(repetitions, None)["rows"]


def measure(repetitions: int, file: Path | None, dry: bool = False, only: Sequence[str] = ()) -> dict[str, Any]:
    """Runs the sections (those in `only`, or all) and returns what stands in the file, which is written after each.

    Args:
        repetitions: most, of each timed call.
        file: where the result goes; None for docs/benchmarks/gpu-<name of the device>.json, in a dry run for nowhere.
        dry: on the CPU, in Triton's interpreter, with tiny sizes; rows say `dry` and nothing is measured.
        only: names of sections.

    Raises:
        ValueError: if there is no CUDA device, no triton, or no section of such a name.
    """
    device = refuse_what_cannot_run(dry, only)
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    file = file or (None if dry else FOLDER / f"gpu-{slug}.json")
    facts = _facts(device, repetitions, dry)

    def save(run: Run) -> None:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, result(run))

    def result(run: Run) -> dict[str, Any]:
        return {**facts, "seconds": round(SECONDS - run.left, 1), "sections": run.sections, "rows": run.rows}

    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        run = Run(dry, repetitions, save, Path(folder))
        chosen = [section for section in SECTIONS if not only or section.name in only]
        if dry:
            _run(run, chosen, together=True, seconds=600.0)
        for section in () if dry else chosen:
            if section.parts == 1:
                if section.prepared:
                    # Once for all: what is checked and what is to be timed are compiled side by side.
                    _run_side_by_side(run, chosen)
                _run(run, [section], seconds=min(section.seconds, run.left))
        if not dry:
            _run_side_by_side(run, chosen)
    print_summary(run.rows, run.sections)
    if file is not None:
        print(f"written to {file}")
    return result(run)


def refuse_what_cannot_run(dry: bool, only: Sequence[str]) -> str:
    """Name of the device. Raises ValueError as `measure` does."""
    import torch

    from armillary.kernels.select import has_triton

    names = [section.name for section in SECTIONS]
    if unknown := [name for name in only if name not in names]:
        raise ValueError(f"bench gpu: there is no section {unknown[0]!r}; there are: {', '.join(names)}")
    if not has_triton():
        raise ValueError("bench gpu: triton is not installed; it comes with torch's CUDA build")
    if dry:
        return "none"
    if not torch.cuda.is_available() or torch.version.hip:
        raise ValueError("bench gpu: this needs an NVIDIA GPU, and torch finds none; --dry-run shows what would be run")
    return torch.cuda.get_device_name()


def _run_side_by_side(run: Run, chosen: Sequence[Section]) -> None:
    """Checks what is not timed, in many processes, while others compile what will be; does so once."""
    if run.compiled:
        return
    run.compiled = True
    prepared = [section for section in chosen if section.prepared]
    checked = [section for section in chosen if section.parts > 1]
    parts = _processes()
    compiling = [
        Process(prepared, run.folder / f"prepare-{part}", f"{part}/{parts}", run.repetitions, run.dry, prepare=True)
        for part in range(parts if prepared else 0)
    ]
    if prepared:
        print("compiling what will be timed ...", flush=True)
    _run(run, checked, seconds=min(SIDE_BY_SIDE, run.left), beside=compiling)


def _run(
    run: Run, sections: Sequence[Section], *, seconds: float, together: bool = False, beside: Sequence[Process] = ()
) -> None:
    """Runs sections at once, each in as many processes as it has parts or all in one, and adds their rows.

    What went wrong is a row too. Of the processes `beside` them nobody reads the rows.
    """
    began, groups = time.monotonic(), [sections] if together else [[section] for section in sections]
    processes = []
    for group in groups:
        parts = min(max(section.parts for section in group), _processes()) if not together else 1
        outs = [run.folder / f"{group[0].module}-{part}" for part in range(parts)]
        processes += [Process(group, out, f"{p}/{parts}", run.repetitions, run.dry) for p, out in enumerate(outs)]
    run_together([*processes, *beside], seconds)
    found = [row for process in processes for row in process.rows()]
    run.rows += found
    taken = round(time.monotonic() - began, 1)
    for section in sections:
        own = [row for row in found if row["section"] == section.name]
        ok = bool(own) and all(row["ok"] for row in own)
        run.sections.append({"name": section.name, "seconds": taken, "budget": section.seconds, "ok": ok})
    if beside:
        run.sections.append({"name": "compilation", "seconds": taken, "processes": len(beside), "ok": True})
    run.save(run)


def _processes() -> int:
    return max(1, min(8, (os.cpu_count() or 2) // 2))


def _facts(device: str, repetitions: int, dry: bool) -> dict[str, Any]:
    versions = {}
    for package in ("torch", "triton", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "benchmark": "gpu",
        "device": device,
        "dry": dry,
        "repetitions": repetitions,
        "commit": commit(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": versions,
        "notes": NOTES,
    }


def failed(result: dict[str, Any]) -> bool:
    """Whether a section failed: the exit code is 1 then. A target that was missed is no failure."""
    return not all(section["ok"] for section in result["sections"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 if something failed, 2 if nothing could be run."""
    parser = argparse.ArgumentParser(prog="python -m armillary.launch bench gpu", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", action="append", default=[], metavar="SECTION", help="may be repeated")
    options = parser.parse_args(arguments)
    try:
        return int(failed(measure(options.repetitions, options.json, options.dry_run, options.only)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
