"""An uneven cluster on one machine: hosts with links, CPUs and memory of their own, that are gone when it is over."""

import contextlib
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from armillary.launch.lab import delay as carrying
from armillary.launch.lab import leftovers, machines
from armillary.launch.lab.leftovers import clean, controllers_here, fails, new_prefix, remove
from armillary.launch.lab.machines import Machine
from armillary.launch.lab.network import INTERFACE, Command, Network, address, host_name, plan_network
from armillary.launch.lab.permission import why_not
from armillary.launch.lab.spec import LabSpec

PORT = 29500
# Moves itself into the control groups before the `--`, so that the command and all that it starts are in them.
ENTER = 'while [ "$1" != -- ]; do echo $$ > "$1" || exit 126; shift; done; shift; exec "$@"'


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

    def run(self, command: Sequence[str], seconds: float = 600.0) -> list[str]:
        """Runs a command as all ranks of the lab, and returns what each has printed.

        Raises:
            RuntimeError: if a rank fails, with what it told; then the others are ended.
            TimeoutError: if they take longer than `seconds`.
        """
        with contextlib.ExitStack() as stack:
            outputs, errors, ranks = [], [], []
            stack.callback(self._end)
            for host, local in itertools.product(range(self.spec.num_hosts), range(self.spec.ranks_per_host)):
                outputs.append(stack.enter_context(tempfile.TemporaryFile("w+")))
                errors.append(stack.enter_context(tempfile.TemporaryFile("w+")))
                added = self.rank_environment(host, local)
                ranks.append(self.hosts[host].popen(command, added, stdout=outputs[-1], stderr=errors[-1]))
            deadline = time.monotonic() + seconds
            codes: list[int | None] = [None]
            while None in codes:
                codes = [rank.poll() for rank in ranks]
                for rank, code in enumerate(codes):
                    if code:
                        told = _all_of(errors[rank])
                        raise RuntimeError(f"rank {rank} of {shlex.join(command)} ended with {code}: {told}")
                if None in codes and time.monotonic() > deadline:
                    raise TimeoutError(f"{shlex.join(command)}: still runs after {seconds:g} s")
                time.sleep(0.005)
            return [_all_of(output) for output in outputs]

    def _end(self) -> None:
        for host in self.hosts:
            machines.end(host.machine)

    def sent(self) -> dict[str, tuple[int, int]]:
        """Bytes that the two ends of each link have sent since it was made, by the kernel's own counters."""
        namespaces = {link.ends[0].namespace for link in self.network.links}
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
    controllers = controllers_here()
    assert controllers is not None
    prefix = new_prefix()
    network = plan_network(spec, prefix)
    guard = _helper(leftovers.__name__, prefix)
    with contextlib.ExitStack() as stack:
        stack.callback(_end_helper, guard)
        stack.callback(remove, controllers, prefix)
        hosts = []
        for number, namespace in enumerate(network.hosts):
            cpus = spec.cpus[number] if spec.cpus else None
            memory = spec.memory[number] if spec.memory else None
            machine = machines.make(controllers, namespace, cpus, memory)
            hosts.append(Host(host_name(number), address(number), namespace, machine))
        _run(network.setup)
        if spec.delay:
            stack.callback(_end_helper, _carrier(network, spec.delay))
        else:
            _run(network.cables)
        _run(network.commands)
        yield Lab(spec, network, tuple(hosts))


def _run(commands: Sequence[Command]) -> None:
    for command in commands:
        if (told := fails(command)) is not None:
            raise ValueError(f"the lab could not be set up: {' '.join(command)}: {told}")


def _carrier(network: Network, delay: float) -> "subprocess.Popen[bytes]":
    """Starts the process that makes and joins the links of a network with a delay."""
    process = _helper(carrying.__name__)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(carrying.order(network.links, delay))
    process.stdin.flush()
    if process.stdout.readline() != b"ready\n":
        _end_helper(process)
        raise ValueError(f"the lab's delay could not be set up with {carrying.DEVICE}; its reason is above")
    return process


def _helper(module: str, *arguments: str) -> "subprocess.Popen[bytes]":
    """Starts a process that ends when this one does, for its input ends then."""
    words = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)


def _end_helper(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.stdout.close()
    process.wait()


def _all_of(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True, start_new_session=True).stdout
