"""`python -m armillary.launch.compile_gate`: every shipped kernel compiles well for every GPU, proved without a GPU.

Compiles all that the `specimens()` of modules in `kernels/` list and fails where one spills registers to memory, needs
more shared memory than a block has, misses the tensor cores it is meant for, or does not compile.
"""

import argparse
import functools
import importlib
import importlib.util
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path

from armillary.kernels import specimen
from armillary.kernels.specimen import Specimen
from armillary.launch.compiled import DEVICES, Row, compile_specimen
from armillary.launch.rows import commit
from armillary.train.files import write_json

KERNELS = "armillary.kernels"
Job = tuple[tuple[str, ...], str, str]
"""Modules, a specimen's name, an architecture: names alone, so that any kind of process can be given it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 if all is well, 1 if a kernel failed, 2 if there was nothing to compile with or for."""
    options = parser().parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported: its kernels could not be compiled
    if importlib.util.find_spec("triton") is None:
        print("compile gate: triton is not installed; install it with: pip install triton", file=sys.stderr)
        return 2
    modules = tuple(options.module or shipped_modules())
    architectures = options.arch or list(DEVICES)
    jobs = [
        (modules, name, architecture)
        for name, shipped in collect(modules).items()
        for architecture in architectures
        if architecture in shipped.architectures and re.search(options.only, name)
    ]
    if not jobs:
        print("compile gate: there is no such kernel", file=sys.stderr)
        return 2
    version = importlib.import_module("triton").__version__
    print(f"triton {version}: {len(jobs)} compilations", flush=True)
    began = time.perf_counter()
    width = max(len(name) for _, name, _ in jobs)
    rows = []
    with tempfile.TemporaryDirectory(prefix="compile-gate-") as empty:
        os.environ["TRITON_CACHE_DIR"] = str(options.cache or empty)
        for row in compile_all(jobs):
            print(line(row, width), flush=True)
            rows.append(row)
    failed = [row for row in rows if row.failures]
    for row in failed:
        print(f"FAILED {row.name} {row.architecture}: {'; '.join(row.failures)}")
    print(f"{len(rows) - len(failed)} passed, {len(failed)} failed in {time.perf_counter() - began:.0f} s", flush=True)
    if options.json:
        order = {(name, architecture): place for place, (_, name, architecture) in enumerate(jobs)}
        rows.sort(key=lambda row: order[row.name, row.architecture])
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, {"triton": version, "commit": commit(), "rows": [asdict(row) for row in rows]})
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m armillary.launch.compile_gate", description=__doc__)
    parser.add_argument("--arch", action="append", choices=list(DEVICES), help="may be repeated; all by default")
    parser.add_argument("--only", default="", metavar="REGEX", help="specimens whose name has this in it")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="Triton's cache; an empty one by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON too")
    parser.add_argument("--module", action="append", help="take specimens from this module, not from those shipped")
    return parser


def shipped_modules() -> list[str]:
    """Names of the modules in `kernels/` that define `specimens`."""
    root = Path(specimen.__file__).parent
    paths = [path for path in sorted(root.glob("**/*.py")) if "\ndef specimens(" in path.read_text()]
    return [".".join((KERNELS, *path.relative_to(root).with_suffix("").parts)) for path in paths]


@functools.cache
def collect(modules: tuple[str, ...]) -> dict[str, Specimen]:
    """Every specimen of these modules, by name.

    Raises:
        ValueError: if two have one name, a module offers none, or one names an architecture that is not known.
    """
    found: dict[str, Specimen] = {}
    for module in modules:
        specimens: list[Specimen] = getattr(importlib.import_module(module), "specimens", list)()
        if not specimens:
            raise ValueError(f"{module} has no specimens() that lists its kernels")
        for shipped in specimens:
            if shipped.name in found:
                raise ValueError(f"{module}: a second specimen is named {shipped.name}")
            if unknown := set(shipped.architectures) - set(DEVICES):
                raise ValueError(f"{module}: {shipped.name} names {', '.join(unknown)}")
            found[shipped.name] = shipped
    return found


def compile_all(jobs: list[Job]) -> Iterator[Row]:
    """Rows as they come, on all cores.

    An assertion inside a compiler ends its process and breaks the pool; what was unfinished then runs one by one, each
    in a process of its own, so that the row of the culprit says so.
    """
    unfinished = []
    with ProcessPoolExecutor(os.cpu_count(), initializer=quiet) as pool:
        futures = {pool.submit(compile_job, job): job for job in jobs}
        for future in as_completed(futures):
            try:
                yield future.result()
            except BrokenProcessPool:
                unfinished.append(futures[future])
    for job in unfinished:
        with ProcessPoolExecutor(1, initializer=quiet) as pool:
            try:
                yield pool.submit(compile_job, job).result()
            except BrokenProcessPool:
                yield Row(job[1], job[2], failures=("the compiler ended its process",))


def compile_job(job: Job) -> Row:
    modules, name, architecture = job
    return compile_specimen(collect(modules)[name], architecture)


def quiet() -> None:
    """On an error Triton prints the whole program; the row tells what matters."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.dup2(null, sys.stderr.fileno())
    os.close(null)


def line(row: Row, width: int) -> str:
    if row.usage is None:
        measured = "did not compile"
    else:
        usage = row.usage
        products = " ".join(f"{kind} {count}" for kind, count in row.products.items())
        measured = (
            f"regs {usage.registers:3d}  stack {usage.stack:4d}  spills {usage.spills:4d}  "
            f"shared {row.shared / 1024:5.1f} KiB  warps {row.warps:2d}  {row.seconds:5.1f} s  {products or '-':<9}"
        )
    return f"{row.name:<{width}}  {row.architecture:<6}  {measured}  {'FAILED' if row.failures else 'ok'}"


if __name__ == "__main__":
    sys.exit(main())
