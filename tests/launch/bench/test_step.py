"""The tables of `bench/step.py` say what a step took, held, copied and sent."""

import time
from pathlib import Path

import torch

from armillary.launch.bench.alive import Alive
from armillary.launch.bench.step import measure, timed
from armillary.train.config.run_config import load_config

TINY = Path(__file__).parents[3] / "configs" / "tiny.toml"
MB = 250_000
"""Elements of a million bytes in float32."""


def test_the_peak_has_what_is_alive_at_once():
    kept = torch.zeros(3 * MB)
    with Alive({"known": [kept, kept[MB:]]}) as seen:
        first = torch.ones(2 * MB)
        view = first[:MB]
        del first  # its memory lives in the view
        second = torch.ones(4 * MB)
        del second
        third = torch.ones(1 * MB)
    assert dict(seen.peak) == {"known": 12 * MB, "elsewhere": 24 * MB}
    del view, third


def test_memory_given_back_is_no_longer_counted():
    with Alive({}) as seen:
        gathered = torch.ones(4 * MB)
        gathered.untyped_storage().resize_(0)  # as FSDP frees weights
        other = torch.ones(5 * MB)
    assert seen.peak.total() == 20 * MB
    del gathered, other


def test_copies_are_counted_with_their_bytes():
    source = torch.ones(MB)
    with Alive({}) as seen:
        torch.empty(MB).copy_(source)
        torch.cat([source, source])
        source.sum().item()
    assert seen.copies == {("copy_", "elsewhere"): 1, ("cat", "elsewhere"): 1, ("_local_scalar_dense", "elsewhere"): 1}
    assert seen.copied["cat", "elsewhere"] == 8 * MB


def test_a_part_gets_the_time_of_its_method_and_gives_the_method_back():
    class Worker:
        def work(self) -> int:
            end = time.process_time() + 0.02
            while time.process_time() < end:
                pass
            return 7

    worker = Worker()
    with timed({"all": (worker, "work"), "by class": (Worker, "work")}) as parts:
        assert (worker.work(), Worker().work()) == (7, 7)
    assert worker.work() == 7
    assert (parts["all"].calls, parts["by class"].calls) == (1, 1)
    assert parts["all"].process >= 0.02
    assert 0.015 <= parts["all"].main <= parts["all"].wall


def test_tables_of_a_run(tmp_path):
    plain = ["data.held_out=0", "data.batch_size=2", "model.dim=16"]
    tables = measure(load_config(TINY, plain, "dp=1"), tmp_path, steps=2)
    times, alive, copies, collectives = tables
    spent = {row[0]: float(row[1]) for row in times[1:]}
    inside = [name for name in spent if not name.startswith(("  ", "whole"))]
    assert spent["forward and backward"] >= spent["  of the micro-batches"] > 0
    assert 0.5 * spent["whole step"] < sum(spent[name] for name in inside) <= spent["whole step"]
    assert {"weights", "optimizer state", "kernels/norm.py"} <= {row[0] for row in alive}
    assert len(copies) > 1
    assert ["all_reduce", "gradient norm", "1", "0.00"] in collectives
