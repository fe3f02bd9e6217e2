"""An uneven cluster on one machine: hosts with links, CPUs and memory of their own, that are gone when it is over."""

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from armillary.launch import lab_machines
from armillary.launch.lab_machines import Controllers, Machine
from armillary.launch.lab_network import INTERFACE, Command, End, Network, address, host_name, limit, plan_network
from armillary.launch.lab_spec import LabSpec

PREFIX = "armillary-lab-"
"""Of all names that a lab makes; its process's id, the time at which that began, and a count follow."""
PORT = 29500
NAMESPACES = Path("/run/netns")
# Moves itself into the control groups before the `--`, so that the command and all that it starts are in them.
ENTER = 'while [ "$1" != -- ]; do echo $$ > "$1" || exit 126; shift; done; shift; exec "$@"'

_count = itertools.count()


@dataclass(frozen=True)
class Host:
    """A host of a lab: a network namespace and a machine."""

    name: str
    address: str
    namespace: str
    machine: Machine

    def popen(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, **options: Any
    ) -> "subprocess.Popen[Any]":
        """Starts a command on the host; `env` is added to the environment; other options are Popen's."""
        groups = [str(folder / "cgroup.procs") for folder in self.machine.distinct]
        inside = ["ip", "netns", "exec", self.namespace, *command]
        added = {"GLOO_SOCKET_IFNAME": INTERFACE, **(env or {})}
        return subprocess.Popen(
            ["sh", "-c", ENTER, "sh", *groups, "--", *inside],
            env={**os.environ, **added},
            start_new_session=True,
            **options,
        )


@dataclass(frozen=True)
class Lab:
    """A lab that is set up."""

    spec: LabSpec
    network: Network
    hosts: tuple[Host, ...]

    def rank_environment(self, host: int, local_rank: int = 0) -> dict[str, str]:
        """What a rank needs to join the others by env://, as torchrun sets it on a host of several."""
        each, hosts = self.spec.ranks_per_host, self.spec.num_hosts
        cpus = self.spec.cpus[host] if self.spec.cpus else (os.cpu_count() or 1) / hosts
        return {
            "RANK": str(host * each + local_rank),
            "WORLD_SIZE": str(hosts * each),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(each),
            "GROUP_RANK": str(host),
            "GROUP_WORLD_SIZE": str(hosts),
            "MASTER_ADDR": address(0),
            "MASTER_PORT": str(PORT),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, int(cpus / each)))),
            "PYTHONUNBUFFERED": "1",
            # The addresses of the hosts have no names, of which each rank would warn.
            "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        }

    def sent(self) -> dict[str, tuple[int, int]]:
        """Bytes that the two ends of each link have sent since it was made, by the kernel's own counters."""
        namespaces = {end.namespace for link in self.network.links for end in link.ends[:1]}
        counted = {}
        for namespace in namespaces:
            for each in json.loads(_ip("-n", namespace, "-j", "-s", "link", "show")):
                counted[namespace, each["ifname"]] = each["stats64"]
        stats = {link.name: counted[link.ends[0].namespace, link.ends[0].interface] for link in self.network.links}
        return {name: (each["tx"]["bytes"], each["rx"]["bytes"]) for name, each in stats.items()}


@contextlib.contextmanager
def lab(spec: LabSpec) -> Iterator[Lab]:
    """Sets up a lab; ends its processes and removes it afterwards, and what dead labs have left behind before.

    Should this very process be killed, a guard that outlives it cleans up.

    Raises:
        ValueError: with what is missing, where a lab is not permitted.
    """
    if why := why_not(spec):
        raise ValueError(why)
    clean()
    controllers = _controllers()
    assert controllers is not None
    prefix = f"{PREFIX}{os.getpid()}-{_birth(os.getpid())}-{next(_count)}"
    network = plan_network(spec, prefix)
    guard = subprocess.Popen([sys.executable, "-m", __name__], stdin=subprocess.PIPE, start_new_session=True)
    try:
        hosts = []
        for number, namespace in enumerate(network.hosts):
            cpus = spec.cpus[number] if spec.cpus else None
            memory = spec.memory[number] if spec.memory else None
            machine = lab_machines.make(controllers, namespace, cpus, memory)
            hosts.append(Host(host_name(number), address(number), namespace, machine))
        for command in network.commands:
            if (told := _fails(command)) is not None:
                raise ValueError(f"the lab could not be set up: {' '.join(command)}: {told}")
        yield Lab(spec, network, tuple(hosts))
    finally:
        _remove(controllers, prefix)
        assert guard.stdin is not None
        guard.stdin.close()
        guard.wait()


def why_not(spec: LabSpec | None = None) -> str | None:
    """Why there can be no lab (of this kind) here, and what to do, in a sentence; None if there can."""
    if not sys.platform.startswith("linux"):
        return "a lab needs Linux: network namespaces and control groups"
    if os.geteuid() != 0:
        return "a lab needs root, to make network namespaces and control groups: run it with sudo"
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"a lab needs {' and '.join(missing)} from the package iproute2: apt-get install iproute2"
    return _no_groups(spec) or _no_network()


def clean() -> list[str]:
    """Removes what labs of dead processes have left behind; returns their names."""
    dead = sorted({prefix for name in _names() if (prefix := _dead_lab(name))})
    controllers = _controllers()
    for prefix in dead if controllers else []:
        assert controllers is not None
        _remove(controllers, prefix)
    return dead


def _remove(controllers: Controllers, prefix: str) -> None:
    """Ends the processes of one lab, then removes its groups and its namespaces, and with these its links."""
    for machine in lab_machines.find(controllers, f"{prefix}-").values():
        lab_machines.remove(machine)
    for namespace in _namespaces():
        if namespace.startswith(f"{prefix}-"):
            _fails(("ip", "netns", "delete", namespace))


def _names() -> list[str]:
    controllers = _controllers()
    return [*_namespaces(), *(lab_machines.find(controllers, PREFIX) if controllers else [])]


def _namespaces() -> list[str]:
    return [path.name for path in NAMESPACES.glob(f"{PREFIX}*")]


def _dead_lab(name: str) -> str | None:
    """The lab that a name belongs to, if its process is dead. A new process may have the id of a dead one."""
    found = re.match(rf"{PREFIX}(\d+)-(\d+)-\d+(?=-)", name)
    return found[0] if found and _birth(int(found[1])) != int(found[2]) else None


def _birth(process: int) -> int | None:
    """When a process began, in ticks since the machine did; None if it is dead."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


def _controllers() -> Controllers | None:
    try:
        return lab_machines.find_controllers(
            Path("/proc/self/mounts").read_text(), Path("/proc/self/cgroup").read_text()
        )
    except OSError:
        return None


def _no_groups(spec: LabSpec | None) -> str | None:
    controllers = _controllers()
    if controllers is None:
        return "a lab needs control groups, and none are mounted: mount -t cgroup2 none /sys/fs/cgroup"
    wanted = {"cpu": spec is None or spec.cpus, "memory": spec is None or spec.memory}
    missing = [name for name, want in wanted.items() if want and name not in controllers.folders]
    if missing:
        remedy = f"mount -t cgroup -o {missing[0]} none /sys/fs/cgroup/{missing[0]}"
        if controllers.version == 2:
            remedy = f"echo +cpu +memory > {controllers.roots[0] / 'cgroup.subtree_control'}"
        return f"a lab needs control groups for {' and '.join(missing)}: {remedy}"
    closed = [str(root) for root in controllers.roots if not os.access(root, os.W_OK)]
    if closed:
        return f"a lab needs to write to {closed[0]}; in a container, run it with --privileged"
    return None


def _no_network() -> str | None:
    """Tries what a lab's network needs in a namespace of its own."""
    name = f"{PREFIX}{os.getpid()}-{_birth(os.getpid())}-{next(_count)}-trial"
    if (told := _fails(("ip", "netns", "add", name))) is not None:
        return f"a lab needs network namespaces ({told}); in a container, run it with --privileged"
    try:
        kinds = {
            "bridges": ("ip", "-n", name, "link", "add", "name", "b", "type", "bridge"),
            "veth pairs": ("ip", "-n", name, "link", "add", "name", "v", "type", "veth", "peer", "name", "w"),
            "token buckets": limit(End(name, "v"), 1_000_000),
        }
        for kind, command in kinds.items():
            if (told := _fails(command)) is not None:
                module = {"bridges": "bridge", "veth pairs": "veth", "token buckets": "sch_tbf"}[kind]
                return f"a lab needs {kind}, which this kernel refuses ({told}); try modprobe {module}"
    finally:
        _fails(("ip", "netns", "delete", name))
    return None


def _fails(command: Command) -> str | None:
    """Runs a command; what it told if it failed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else (done.stderr.strip() or f"exit code {done.returncode}").replace("\n", "; ")


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    # The guard of a lab: its input ends when the lab's process does, however that happens.
    sys.stdin.read()
    clean()
