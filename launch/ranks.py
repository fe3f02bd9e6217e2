"""Starts a run's ranks on this machine, through torchrun's own agent, and tells why they failed in one sentence."""

import json
import logging
import os
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from armillary.train.failure import ERRORS_FOLDER, FAILED, Failure, RunStopped

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


RANK_BYTES = 200_000_000
"""Memory that a rank takes before it has a model: what torch and its libraries do, less what all of them share."""


def check_room(num_ranks: int) -> None:
    """Refuses more ranks than this machine has memory for, whatever they compute.

    Raises:
        ValueError: saying how many there may be.
    """
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // RANK_BYTES
    if num_ranks > max(most, 1):
        raise ValueError(
            f"plan: its degrees need {num_ranks} ranks, and this machine has memory for at most {most}, even without "
            "a model; lower them, or start the ranks on several machines with torchrun"
        )


def start_ranks(num_ranks: int, module: str, arguments: Sequence[str], debug: bool = False) -> Failure | None:
    """Runs `python -m module *arguments` as `num_ranks` ranks and waits for them.

    Returns the first failure among the ranks, or None when all of them ended well. If one fails, the others are
    stopped. An interrupt stops them too.

    Raises:
        ValueError: if this machine has no room for so many.
        RunStopped: if its processes cannot speak to each other.
    """
    if not debug:
        # Read when torch is imported, here and by the ranks: notes of its C++ code, as on names that do not resolve.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    check_room(num_ranks)
    _check_loopback()
    # Each of the agent's modules has set the level of a logger of its own.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.WARNING if debug else logging.CRITICAL)
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # The ranks of one machine speak over loopback, so a host name that does not resolve cannot stop them.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    with tempfile.TemporaryDirectory(prefix="armillary-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_ranks,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            run_id=str(uuid.uuid4()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
        )
        os.environ[ERRORS_FOLDER] = folder
        try:
            elastic_launch(config, sys.executable)("-m", module, *arguments)
        except ChildFailedError as error:
            return _root_cause(error.failures, Path(folder))
        except SignalException as interrupt:
            name, code = signal.Signals(interrupt.sigval).name, 128 + interrupt.sigval
            return Failure(0, f"stopped by {name}", traceback="", exit_code=code, bug=False, time=0.0)
        finally:
            del os.environ[ERRORS_FOLDER]
    return None


def run_ranks(num_ranks: int, module: str, arguments: Sequence[str], debug: bool = False) -> None:
    """`start_ranks`, whose failure is raised.

    Raises:
        RunStopped: if a rank told in a sentence why it failed.
        RuntimeError: with the rank's traceback, if it is a mistake of ours.
    """
    failure = start_ranks(num_ranks, module, arguments, debug)
    if failure is not None:
        raise RuntimeError(failure.traceback) if failure.bug else RunStopped(failure.message)


def _check_loopback() -> None:
    try:
        with socket.create_server(("localhost", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=10).close()
    except OSError as error:
        raise RunStopped(
            f"the processes of this machine cannot speak to each other over localhost ({error}); bring the loopback "
            "device up (ip link set lo up), and let /etc/hosts name localhost"
        ) from error


def _root_cause(failures: Mapping[int, "ProcessFailure"], errors: Path) -> Failure:
    """Why the ranks failed: the one that a signal ended, for the others only lost their connection to it; else the
    first that told. SIGTERM counts last, since it is also how the agent stops the others."""
    told = [Failure(**json.loads(path.read_text())) for path in errors.glob("rank-*.json")]
    first = min(told, key=lambda failure: (failure.follows, failure.time), default=None)
    ended = sorted(failures.items(), key=lambda item: (item[1].exitcode >= 0, item[1].exitcode == -signal.SIGTERM))
    rank, process = ended[0]
    if process.exitcode < 0 and process.exitcode != -signal.SIGTERM:
        return _died(rank, process)
    if first is None or (first.follows and process.exitcode < 0):
        return _died(rank, process)
    return first


def _died(rank: int, process: "ProcessFailure") -> Failure:
    """The failure of a rank that ended without a word: killed, or crashed in native code."""
    code = process.exitcode
    cause = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = "; that often means that the machine ran out of memory: try a smaller batch" if code == -9 else ""
    message = f"rank {rank} {cause}{hint}"
    return Failure(rank, message, traceback="", exit_code=FAILED, bug=False, time=0.0)
