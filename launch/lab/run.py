"""`armillary lab`: runs one command as the ranks of a lab's hosts, and tells what went over which link."""

import contextlib
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from armillary.launch.lab.cluster import Lab, lab
from armillary.launch.lab.figures import figures, print_figures
from armillary.launch.lab.leftovers import clean
from armillary.launch.lab.machines import SECONDS_TO_END, end
from armillary.launch.lab.permission import why_not
from armillary.launch.lab.spec import LabSpec
from armillary.launch.rows import commit

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class _Rank:
    """One process of the command."""

    name: str
    host: int
    process: "subprocess.Popen[str]"
    readers: list[threading.Thread]
    exit_code: int | None = None


def run_in_lab(spec: LabSpec, command: Sequence[str]) -> dict[str, Any]:
    """Runs a command on every host, once for each of its ranks, prints its output and a table, and returns the figures.

    The exit code is that of the first rank that failed; then the others are stopped.

    Raises:
        ValueError: if there is no such command, or a lab is not permitted here.
    """
    words = as_program(command)
    _warn(spec)
    with _signals_noted() as signals, lab(spec) as it:
        ranks: list[_Rank] = []
        before, began = it.sent(), time.monotonic()
        for host, local in itertools.product(range(spec.num_hosts), range(spec.ranks_per_host)):
            ranks.append(_start(it, host, local, words))
        exit_code = _wait(ranks, signals)
        wall = time.monotonic() - began
        _stop(it, ranks)
        codes = [[rank.exit_code for rank in ranks if rank.host == host] for host in range(spec.num_hosts)]
        result = {"exit_code": exit_code, "wall_seconds": wall, **figures(it, before, codes)}
    print_figures(result)
    return {"command": shlex.join(command), "commit": commit(), "measured": True, **result}


def as_program(command: Sequence[str]) -> list[str]:
    """What is started for a command: as with torchrun, a script or `-m module` is run by this Python.

    Raises:
        ValueError: if there is no such command, or it is one that does not join the ranks of a lab.
    """
    if not command:
        raise ValueError("say what to run on each host, after --, for example: armillary lab --hosts 2 -- hostname")
    if command[0] == "-m" or command[0].endswith(".py"):
        return [sys.executable, *command]
    if os.path.basename(command[0]) == "armillary" and command[1:2] == ["parity"]:
        raise ValueError("armillary parity starts its ranks itself, and would on each host; run it outside a lab")
    if shutil.which(command[0]) is None:
        raise ValueError(f"{command[0]}: there is no such command to run on the hosts")
    return list(command)


def remove_leftovers() -> None:
    """Removes, and prints the names of, what labs of dead processes have left behind.

    Raises:
        ValueError: where a lab is not permitted, and so none can have been.
    """
    if why := why_not():
        raise ValueError(why)
    for name in clean():
        print(f"removed {name}")


def _warn(spec: LabSpec) -> None:
    cores = os.cpu_count() or 1
    if spec.cpus and sum(spec.cpus) > cores:
        print(
            f"note: the hosts have {sum(spec.cpus):g} cores together, this machine {cores}: not all can have theirs",
            file=sys.stderr,
        )


def _start(it: Lab, host: int, local: int, command: Sequence[str]) -> _Rank:
    name = it.hosts[host].name + (f".{local}" if it.spec.ranks_per_host > 1 else "")
    process = it.hosts[host].popen(
        command,
        it.rank_environment(host, local),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    readers = []
    for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
        readers.append(threading.Thread(target=_pass_on, args=(name, source, target), daemon=True))
        readers[-1].start()
    return _Rank(name, host, process, readers)


def _pass_on(name: str, source: IO[str], target: IO[str]) -> None:
    """Prints a process's lines as they come, each in one piece, after its host's name."""
    for line in source:
        with contextlib.suppress(BrokenPipeError):
            target.write(f"{name} | {line.rstrip()}\n")
            target.flush()


def _wait(ranks: list[_Rank], signals: list[int]) -> int:
    """Waits until all ranks have ended well, or one has not, or there is a signal; the exit code."""
    while any(rank.exit_code is None for rank in ranks):
        if signals:
            print(f"stopped by {signal.Signals(signals[0]).name}", file=sys.stderr)
            return 128 + signals[0]
        for rank in ranks:
            if rank.exit_code is None and (code := rank.process.poll()) is not None:
                rank.exit_code = _as_a_shell(code)
                if code != 0:
                    return rank.exit_code
        time.sleep(0.01)
    return 0


def _as_a_shell(code: int) -> int:
    return 128 - code if code < 0 else code


def _stop(it: Lab, ranks: list[_Rank]) -> None:
    """Ends what still runs: first asks, so that it may save, then ends all that is on the hosts."""
    running = [rank for rank in ranks if rank.process.poll() is None]
    for rank in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.process.pid, signal.SIGTERM)
    deadline = time.monotonic() + SECONDS_TO_END
    while any(rank.process.poll() is None for rank in running) and time.monotonic() < deadline:
        time.sleep(0.01)
    for host in it.hosts:
        end(host.machine)
    for rank in ranks:
        rank.exit_code = _as_a_shell(rank.process.wait())
        for reader in rank.readers:
            reader.join(SECONDS_TO_END)


@contextlib.contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """Notes the signals that would end this process, so that they come between two steps of it, and not within one."""
    noted: list[int] = []
    old = {number: signal.signal(number, lambda number, _: noted.append(number)) for number in ENDING_SIGNALS}
    try:
        yield noted
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
