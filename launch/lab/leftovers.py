"""What a lab leaves on the machine: how it is named, so that it is known whose it is, and how it is removed."""

import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from armillary.launch.lab import machines
from armillary.launch.lab.machines import SECONDS_TO_END, Controllers, find_controllers
from armillary.launch.lab.network import Command

PREFIX = "armillary-lab-"
"""Of all names that a lab makes; its process's id, the time at which that began, and a count follow."""
NAMESPACES = Path("/run/netns")

_count = itertools.count()


def new_prefix() -> str:
    """What the names of a new lab of this process begin with; a dash and the host's name follow."""
    return f"{PREFIX}{os.getpid()}-{birth(os.getpid())}-{next(_count)}"


def clean() -> list[str]:
    """Removes what labs of dead processes have left behind; returns their names."""
    dead = sorted({prefix for name in names() if (prefix := dead_lab(name))})
    controllers = controllers_here()
    for prefix in dead if controllers else []:
        assert controllers is not None
        remove(controllers, prefix)
    return dead


def remove(controllers: Controllers, prefix: str) -> None:
    """Ends the processes of one lab, then removes its groups and its namespaces, and with these its links."""
    for machine in machines.find(controllers, f"{prefix}-").values():
        machines.remove(machine)
    for namespace in _namespaces():
        if namespace.startswith(f"{prefix}-"):
            fails(("ip", "netns", "delete", namespace))


def names() -> list[str]:
    """Of the namespaces and groups of all labs."""
    controllers = controllers_here()
    return [*_namespaces(), *(machines.find(controllers, PREFIX) if controllers else [])]


def _namespaces() -> list[str]:
    return [path.name for path in NAMESPACES.glob(f"{PREFIX}*")]


def dead_lab(name: str) -> str | None:
    """The lab that a name belongs to, if its process is dead. A new process may have the id of a dead one."""
    found = re.match(rf"{PREFIX}(\d+)-(\d+)-\d+(?=-)", name)
    return found[0] if found and birth(int(found[1])) != int(found[2]) else None


def birth(process: int) -> int | None:
    """When a process began, in ticks since the machine did; None if it is dead."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


def controllers_here() -> Controllers | None:
    try:
        return find_controllers(Path("/proc/self/mounts").read_text(), Path("/proc/self/cgroup").read_text())
    except OSError:
        return None


def fails(command: Command) -> str | None:
    """Runs a command; what it told if it failed."""
    # In a session of its own, for a terminal's Ctrl-C goes to all that are in one.
    done = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    return None if done.returncode == 0 else (done.stderr.strip() or f"exit code {done.returncode}").replace("\n", "; ")


def guard(prefix: str) -> None:
    """Waits for the end of its input, which is that of the lab's process, however it ends; removes what is left."""
    sys.stdin.read()
    deadline = time.monotonic() + SECONDS_TO_END
    # A process that ends closes its pipes a moment before it counts as dead.
    while any(name.startswith(f"{prefix}-") for name in names()) and time.monotonic() < deadline:
        clean()
        time.sleep(0.02)


if __name__ == "__main__":
    guard(sys.argv[1])
