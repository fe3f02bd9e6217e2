"""The one helper that starts ranks in tests: real processes, a real gloo group, each rank's traceback on failure.

Ranks are forked from a server that has once imported torch, our own code and what tests import, so a rank costs tens
of milliseconds, not seconds.
"""

import gc
import importlib.util
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from armillary.launch import matrix_ranks

TIMEOUT_SECONDS = 120
PRELOADED = [
    *matrix_ranks.PRELOADED,
    "armillary.train.trainer",
    "torch.distributed.pipelining.schedules",
    "hypothesis",
    "pytest",
]
"""A process has one server, whoever starts it: the matrix's ranks are forked from it too."""


class RankFailure(AssertionError):
    """At least one rank raised or died; the message holds every traceback."""


def _load(path: str, name: str) -> Callable[..., Any]:
    """The function `name` of the test file at `path`, which need not be importable by name."""
    module_name = "rank_of_" + Path(path).stem
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    return getattr(sys.modules[module_name], name)


def _rank_main(path: str, name: str, rank: int, num_ranks: int, store: str, args: tuple, outbox: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    gc.freeze()  # what the server imported, all of which lives as long as the rank
    torch.set_num_threads(1)
    try:
        fn = _load(path, name)
        file_store = dist.FileStore(store, num_ranks)
        dist.init_process_group(
            "gloo", store=file_store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=TIMEOUT_SECONDS)
        )
        result = fn(rank, *args)
        dist.barrier()
        outbox.put((rank, True, result))
        dist.destroy_process_group()
    except BaseException:
        outbox.put((rank, False, traceback.format_exc()))


def start(fn: Callable[..., Any], num_ranks: int, folder: str, *args: Any) -> tuple[list[Any], Any]:
    """Starts `fn(rank, *args)` on fresh processes in one gloo group that meets in `folder`; returns them and the queue
    of their results."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    outbox = context.SimpleQueue()
    path, store = fn.__code__.co_filename, f"{folder}/store"
    ranks = [
        context.Process(target=_rank_main, args=(path, fn.__name__, rank, num_ranks, store, args, outbox), daemon=True)
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    return ranks, outbox


def run(fn: Callable[..., Any], num_ranks: int, *args: Any) -> list[Any]:
    """Runs `fn(rank, *args)` on `num_ranks` fresh processes in one gloo group; returns what each rank returned.

    `fn` is a module-level function; arguments and results are plain Python or numpy. Raises RankFailure as soon as
    one rank fails, with every traceback that arrived, and stops the others.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks, outbox = start(fn, num_ranks, folder, *args)
        try:
            return _collect(ranks, outbox)
        finally:
            for process in ranks:
                process.join(timeout=5)
                process.kill()


def _collect(ranks: list[Any], outbox: Any) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while len(results) < len(ranks):
        if not outbox.empty():
            rank, ok, value = outbox.get()
            (results if ok else failures)[rank] = value
            # The first failure makes the others fail: give them a moment to say so, then stop.
            deadline = deadline if ok else min(deadline, time.monotonic() + 2)
        dead = [r for r, p in enumerate(ranks) if p.exitcode not in (None, 0) and r not in failures | results]
        if (dead and outbox.empty() and not failures) or time.monotonic() > deadline:
            failures |= {r: f"died with exit code {ranks[r].exitcode}" for r in dead}
            failures = failures or {r: "did not answer in time" for r in range(len(ranks)) if r not in results}
            break
        if failures and len(failures) + len(results) == len(ranks):
            break
        time.sleep(0.005)
    if failures:
        raise RankFailure("\n".join(f"--- rank {rank}\n{text}" for rank, text in sorted(failures.items())))
    return [results[rank] for rank in range(len(ranks))]
