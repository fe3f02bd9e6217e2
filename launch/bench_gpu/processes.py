"""The processes of `armillary bench gpu`: each does its jobs on the card, and what ends one is told and passed by."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from armillary.launch.bench_gpu.sections import Section, complete
from armillary.launch.rows import Row

GRACE = 10.0
"""Seconds after its time in which a process may finish its last job."""


@dataclass
class Process:
    """What one process of a section is told; several sections may share one."""

    sections: Sequence[Section]
    out: Path
    """Where it writes its rows, and for each job a line before it."""
    part: str
    repetitions: int
    dry: bool
    prepare: bool = False
    first: int = 0
    """Jobs that are left out: they were done."""
    ends: list[Row] = field(default_factory=list)
    """A row for each time that it ended early."""

    def command(self, seconds: float) -> list[str]:
        numbers = {"--part": self.part, "--first": self.first, "--repetitions": self.repetitions}
        numbers |= {"--seconds": f"{seconds:.0f}", "--out": self.out}
        options = [str(word) for pair in numbers.items() for word in pair]
        flags = ["--dry-run"] * self.dry + ["--prepare"] * self.prepare
        names = [section.name for section in self.sections]
        return [sys.executable, "-m", "armillary.launch.bench_gpu.sections", *names, *options, *flags]

    def rows(self) -> list[Row]:
        """Its own, and of how it ended."""
        lines = self._lines()
        found = [line for line in lines if "job" not in line] + self.ends
        if lines or found:
            return found
        told = {"name": "all", "ok": False, "error": "not run: the time of the command was up"}
        return [complete(told, section.name, self.dry) for section in self.sections]

    def ended(self, code: int | str) -> bool:
        """Notes how it ended; whether it should go on, with the job after that at which it ended."""
        if code == 0:
            return False
        jobs = [line for line in self._lines() if "job" in line]
        last: Row = jobs[-1] if jobs else {"job": 0, "name": "its start", "section": self.sections[0].name}
        told = f"the process of part {self.part} ended early: {code}"
        self.ends.append(complete({"name": last["name"], "ok": False, "error": told}, last["section"], self.dry))
        on = isinstance(code, int) and last["job"] > self.first
        self.first = max(self.first, last["job"])
        return on

    def _lines(self) -> list[Row]:
        """One that was left unfinished is left out."""
        found: list[Row] = []
        for line in self.out.read_text().splitlines() if self.out.exists() else []:
            with suppress(ValueError):
                found.append(json.loads(line))
        return found


def run_together(processes: Sequence[Process], seconds: float) -> None:
    """Runs them at once, and again what ended early; those that do not end in time are ended."""
    deadline = time.monotonic() + seconds
    waiting = list(processes)
    while waiting and time.monotonic() < deadline:
        left = deadline - time.monotonic()
        # In sessions of their own, so that what a process itself has started ends with it.
        running = [
            subprocess.Popen(each.command(left), env=environment(each.dry), start_new_session=True) for each in waiting
        ]
        try:
            codes = [_wait(each, deadline + GRACE) for each in running]
        finally:
            for each in running:
                _end(each)
        waiting = [process for process, code in zip(waiting, codes, strict=True) if process.ended(code)]


def _wait(process: subprocess.Popen[bytes], deadline: float) -> int | str:
    """Its exit code, or that it was ended."""
    try:
        return process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        _end(process)
        process.wait()
        return "killed, since its time was up"


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def environment(dry: bool) -> dict[str, str]:
    """Of a section's process."""
    kept = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "ARMILLARY_KERNELS")}
    # One: each process compiles alone, and there are as many as there are processors for.
    kept |= {"ARMILLARY_KERNELS": "triton", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return kept | ({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if dry else {})
