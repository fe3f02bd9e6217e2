"""The ranks of one case of the parity matrix, each a new process, forked from a server that has imported everything.

New ones for each case, since old ones are no gain: forked so, they start in milliseconds, while ranks that judged one
case after the other took four times as long after fifty. Orders and answers are JSON.
"""

import gc
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from armillary.train.failure import leave

PRELOADED = [
    "armillary.launch.matrix_ranks",
    "armillary.train.proof.matrix_case",
    "pydantic",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.pipelining",
    "torch.utils.checkpoint",
    "deepspeed",
]
"""Of which a module that is not installed is passed over."""
LONGEST_CASE = 240.0
"""Seconds."""
MOST_INDUCTOR_RANKS = 2
"""With more, compiled blocks are traced, cut at breaks and joined with their backward, all of which a plan can spoil;
but no C++ is made of them, which is the same for any plan and takes g++ ten seconds a rank."""


def judge_on_ranks(case: dict[str, str], num_ranks: int, folder: Path) -> dict[str, Any]:
    """The result of a case (see train/proof/matrix_case.py), and its `seconds` and `processor_seconds`.

    If a rank fails or the case takes too long, the result has `error` infinite and `worst` the reason.

    Args:
        folder: keeps the traces that cases share.
    """
    started = time.perf_counter()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="armillary-matrix-") as meeting:
        order = {"case": case, "num_ranks": num_ranks, "store": f"{meeting}/store", "folder": str(folder)}
        processes, pipes = [], []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=answer, args=(theirs, rank, json.dumps(order)), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        try:
            answers = _answers(pipes)
        finally:
            for process in processes:
                process.join(timeout=0 if process.exitcode is None else None)
                process.kill()
                process.join()
    facts = {"seconds": time.perf_counter() - started}
    failures = [said["failure"] for said in answers if "failure" in said]
    if failures:
        return {"error": float("inf"), "worst": _first_cause(failures), "allowed": 0.0, "ok": False, **facts}
    told = next(said for said in answers if "error" in said)
    return {**told, **facts, "processor_seconds": sum(said["processor_seconds"] for said in answers)}


def _answers(pipes: Sequence[Connection]) -> list[dict[str, Any]]:
    """One of each rank; after a failure those of the ranks that fail with it."""
    answers: list[dict[str, Any]] = []
    left, deadline = list(pipes), time.monotonic() + LONGEST_CASE
    while left:
        ready = wait(left, max(0.0, deadline - time.monotonic()))
        if not ready:
            if not any("failure" in said for said in answers):
                answers.append({"failure": f"{len(left)} ranks did not answer in {LONGEST_CASE:.0f} s"})
            break
        for pipe in left[:]:
            if pipe not in ready:
                continue
            left.remove(pipe)
            try:
                answers.append(json.loads(pipe.recv_bytes()))
            except EOFError:
                answers.append({"failure": "a rank ended without a word"})
            if "failure" in answers[-1]:
                deadline = min(deadline, time.monotonic() + 2)
    return answers


def _first_cause(failures: Sequence[str]) -> str:
    """Not one that only lost its connection to a rank that failed first."""
    return min(failures, key=lambda text: "closed by peer" in text or "reset by peer" in text)


def answer(pipe: Connection, rank: int, order: str) -> None:
    """One rank: judges its case, answers, ends."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    import torch
    import torch._inductor.config

    # What was imported lives as long as the rank: DeepSpeed alone collects garbage as often as takes a third of it.
    gc.freeze()
    torch.set_num_threads(1)
    # Else each rank starts processes to compile in, which costs more than they compile.
    torch._inductor.config.compile_threads = 1
    told = json.loads(order)
    if told["num_ranks"] > MOST_INDUCTOR_RANKS:
        torch.compiler.set_default_backend("aot_eager")
    try:
        said = _judge(told, rank)
    except Exception:
        said = {"failure": traceback.format_exc()}
    said["processor_seconds"] = time.process_time()
    pipe.send_bytes(json.dumps(said).encode())
    leave(0)


def _judge(order: dict[str, Any], rank: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from armillary.parallel.mesh import make_ranks
    from armillary.train.proof.matrix import config_of
    from armillary.train.proof.matrix_case import judge

    size = order["num_ranks"]
    store = dist.FileStore(order["store"], size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=LONGEST_CASE))
    result = judge(order["case"], make_ranks(config_of(order["case"]).plan, torch.device("cpu")), Path(order["folder"]))
    dist.barrier()
    return result
