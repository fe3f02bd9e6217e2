"""The machine of a lab's host as a control group: its CPU quota, its memory limit, and the end of all its processes."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PERIOD = 10_000
"""Microseconds between two shares of CPU time: short, so that a slow host is slow in each step, not now and then."""
LEAST_QUOTA = 1_000
SHARES = {1: ("cpu.shares", 100 * 1024), 2: ("cpu.weight", 1000)}
"""File and text for one core: hosts come before what else runs on the machine, and stay in proportion among themselves
should there be too few cores for all of them."""
SECONDS_TO_END = 10.0
ALWAYS = ("freezer", "cpuacct")


@dataclass(frozen=True)
class Controllers:
    """Where groups of each controller are made: version 1 has a tree for each of them, version 2 one for all."""

    version: int
    folders: dict[str, Path]
    roots: tuple[Path, ...]


@dataclass(frozen=True)
class Machine:
    """The control groups of one host."""

    version: int
    folders: dict[str, Path]

    @property
    def distinct(self) -> list[Path]:
        """The folders, that of the freezer first: a process enters it first, and it is removed first, so that none is
        on its way into a machine whose processes were ended."""
        return list(dict.fromkeys([self.folders[ALWAYS[0]], *self.folders.values()]))

    def cpu_seconds(self) -> float:
        if self.version == 1:
            return int(Path(self.folders["cpuacct"], "cpuacct.usage").read_text()) / 1e9
        return _field(Path(self.folders["cpuacct"], "cpu.stat"), "usage_usec") / 1e6

    def memory_kills(self) -> int:
        """How many processes the memory limit has ended."""
        if "memory" not in self.folders:
            return 0
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        return _field(Path(self.folders["memory"], name), "oom_kill")

    def processes(self) -> list[int]:
        return [int(line) for line in _read(Path(self.folders["freezer"], "cgroup.procs")).split()]


def find_controllers(mounts: str, own: str) -> Controllers | None:
    """The controllers that this process could use.

    Args:
        mounts: the text of /proc/self/mounts.
        own: the text of /proc/self/cgroup. Groups of version 1 are made below the own one, so that what limits this
            process limits the lab too.
    """
    paths: dict[str, str] = {}
    for line in own.splitlines():
        _, names, path = line.split(":", 2)
        paths |= dict.fromkeys(names.split(","), path)
    folders: dict[str, Path] = {}
    unified = None
    for line in mounts.splitlines():
        _, mount, kind, options = line.split()[:4]
        if kind == "cgroup2":
            unified = unified or Path(mount)
        elif kind == "cgroup":
            for name in {"cpu", "cpuacct", "memory", "freezer"} & set(options.split(",")):
                below = Path(mount + paths.get(name, "/"))
                folders.setdefault(name, below if below.is_dir() else Path(mount))
    if all(name in folders for name in ALWAYS):
        return Controllers(1, folders, tuple(dict.fromkeys(folders.values())))
    if unified is None:
        return None
    # What has no file of its own in version 2 is always there.
    enabled = set(_read(unified / "cgroup.subtree_control").split()) & {"cpu", "memory"}
    return Controllers(2, dict.fromkeys([*ALWAYS, *sorted(enabled)], unified), (unified,))


def limits(version: int, cpus: float | None, memory: int | None) -> list[tuple[str, str, str]]:
    """What to write: controller, file and text. Files of the swap are written only where there are any."""
    texts = []
    if cpus is not None:
        period = max(PERIOD, round(LEAST_QUOTA / cpus))
        quota = round(cpus * period)
        file, one_core = SHARES[version]
        texts.append(("cpu", file, str(max(2, min(round(cpus * one_core), 10_000 if version == 2 else 262_144)))))
        if version == 1:
            texts += [("cpu", "cpu.cfs_period_us", str(period)), ("cpu", "cpu.cfs_quota_us", str(quota))]
        else:
            texts.append(("cpu", "cpu.max", f"{quota} {period}"))
    if memory is not None:
        files = {1: ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"), 2: ("memory.max", "memory.swap.max")}
        limit, swap = files[version]
        texts += [("memory", limit, str(memory)), ("memory", swap, str(memory) if version == 1 else "0")]
    return texts


def make(controllers: Controllers, name: str, cpus: float | None, memory: int | None) -> Machine:
    """Makes a host's groups, with its limits."""
    machine = Machine(controllers.version, {key: folder / name for key, folder in controllers.folders.items()})
    for folder in machine.distinct:
        folder.mkdir()
    for controller, file, text in limits(controllers.version, cpus, memory):
        path = machine.folders[controller] / file
        if path.exists() or "sw" not in file:
            path.write_text(text)
    return machine


def find(controllers: Controllers, prefix: str) -> dict[str, Machine]:
    """Groups whose name starts with `prefix`, by name, wherever they are below the trees' mounts."""
    folders: dict[str, dict[str, Path]] = {}
    for controller, base in controllers.folders.items():
        for parent, names, _ in os.walk(_mount(base)):
            for name in [name for name in names if name.startswith(prefix)]:
                names.remove(name)
                folders.setdefault(name, {})[controller] = Path(parent, name)
    return {name: Machine(controllers.version, found) for name, found in folders.items()}


def end(machine: Machine) -> None:
    """Ends all processes of a machine, at once, and waits until they are gone."""
    deadline = time.monotonic() + SECONDS_TO_END
    while machine.processes() and time.monotonic() < deadline:
        with _frozen(machine):
            for process in machine.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        time.sleep(0.005)


def remove(machine: Machine) -> None:
    """Removes the groups of a machine, after the end of its processes."""
    deadline = time.monotonic() + SECONDS_TO_END
    for folder in machine.distinct:
        while folder.exists():
            end(machine)
            try:
                folder.rmdir()
            except FileNotFoundError:
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)


@contextlib.contextmanager
def _frozen(machine: Machine) -> Iterator[None]:
    """Stops a machine, so that no process of it starts another while they are ended."""
    name, stop, go = ("freezer.state", "FROZEN", "THAWED") if machine.version == 1 else ("cgroup.freeze", "1", "0")
    file = machine.folders["freezer"] / name
    # Another lab may have removed it meanwhile, if its own is dead.
    with contextlib.suppress(OSError):
        file.write_text(stop)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.write_text(go)


def _mount(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.is_mount())


def _field(file: Path, name: str) -> int:
    return next((int(line.split()[1]) for line in _read(file).splitlines() if line.split()[0] == name), 0)


def _read(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text()
    return ""
