"""`armillary bench gpu`: everything that one CUDA card can tell about the kernels, in under nine minutes, in one file.

`python -m armillary.launch bench gpu` is the same on a machine with torch, triton and numpy alone, without typer.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from armillary.launch.bench import Row, commit
from armillary.launch.gpu_report import NOTES, print_summary, write_aside
from armillary.launch.gpu_sections import SECTIONS, Section, command, complete, environment

SECONDS = 530.0
"""Of the whole command, most."""
GRACE = 10.0
"""Seconds after its time in which a section's process may finish its last job."""
FOLDER = Path("docs/benchmarks")


@dataclass
class Run:
    """What is known so far, and how it is gone about."""

    dry: bool
    repetitions: int
    save: Callable[["Run"], None]
    folder: Path
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
            write_aside(file, json.dumps(result(run), indent=1, allow_nan=False).encode() + b"\n")

    def result(run: Run) -> dict[str, Any]:
        return {**facts, "seconds": round(SECONDS - run.left, 1), "sections": run.sections, "rows": run.rows}

    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        run = Run(dry, repetitions, save, Path(folder))
        chosen = [section for section in SECTIONS if not only or section.name in only]
        if dry:
            _run_section(run, chosen, 600.0)
        else:
            _prepare(run, [section for section in chosen if section.prepared])
            for section in chosen:
                _run_section(run, [section], min(section.seconds, run.left))
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


def _prepare(run: Run, sections: Sequence[Section]) -> None:
    """Compiles what will be timed, in many processes; how that goes is seen when it is timed."""
    if not sections:
        return
    print("compiling what will be timed ...", flush=True)
    began, parts = time.monotonic(), _processes()
    seconds = min(140.0, run.left)
    jobs = []
    for part in range(parts):
        out = run.folder / f"prepare-{part}"
        jobs.append(command(sections, out, f"{part}/{parts}", seconds, run.repetitions, run.dry, True))
    codes = _together(jobs, seconds, run.dry)
    taken = round(time.monotonic() - began, 1)
    run.sections.append({"name": "compilation", "seconds": taken, "processes": parts, "exit_codes": codes, "ok": True})


def _run_section(run: Run, sections: Sequence[Section], seconds: float) -> None:
    """Runs them in as many processes as they have parts, and adds their rows; what went wrong is a row too."""
    began = time.monotonic()
    name = ", ".join(section.name for section in sections)
    parts = 1 if run.dry else min(max(section.parts for section in sections), _processes())
    outs = [run.folder / f"{sections[0].module}-{part}" for part in range(parts)]
    jobs = [
        command(sections, out, f"{part}/{parts}", seconds, run.repetitions, run.dry, False)
        for part, out in enumerate(outs)
    ]
    codes = _together(jobs, seconds, run.dry) if seconds > 1 else ["there was no time left"] * parts
    found = [row for out in outs for row in _read(out)]
    for part, code in enumerate(codes):
        if code != 0:
            told = f"the process of part {part + 1} of {parts} ended early: {code}; what it had not yet done is missing"
            found.append(complete({"name": name, "ok": False, "error": told}, name, run.dry))
    run.rows += found
    for section in sections:
        own = [row for row in found if row["section"] in (section.name, name)]
        taken = round(time.monotonic() - began, 1)
        ok = bool(own) and all(row["ok"] for row in own)
        run.sections.append({"name": section.name, "seconds": taken, "budget": section.seconds, "ok": ok})
    run.save(run)


def _together(commands: Sequence[list[str]], seconds: float, dry: bool) -> list[int | str]:
    """Exit codes of processes that run at once; those that do not end in time are ended."""
    # In sessions of their own, so that what a process itself has started ends with it.
    running = [subprocess.Popen(each, env=environment(dry), start_new_session=True) for each in commands]
    codes: list[int | str] = []
    deadline = time.monotonic() + seconds + GRACE
    try:
        for process in running:
            try:
                codes.append(process.wait(max(0.1, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                _end(process)
                process.wait()
                codes.append(f"killed after {seconds + GRACE:.0f} s")
    finally:
        for process in running:
            if process.poll() is None:
                _end(process)
    return codes


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _read(out: Path) -> list[Row]:
    """The rows of a process; a last line that it did not finish is left out."""
    lines = out.read_text().split("\n")[:-1] if out.exists() else []
    return [json.loads(line) for line in lines]


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
