"""Saves that fail, and saves that are killed: as a script, this file kills itself at every system call of a save."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import checkpointer, content_of, empty_like, flip_bit, newest_verified, plain, save, save_all
from safetensors import SafetensorError

from armillary.train.checkpoint import save as under_test
from armillary.train.checkpoint.load import load
from armillary.train.checkpoint.store import complete
from armillary.train.checkpoint.verify import verify

DISK_CALLS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")


# ---- Failures --------------------------------------------------------------------------------------------------------


def full_disk(tensors, path):
    Path(path).write_bytes(b"x" * 100)
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def expect_full_disk(folder, failure, said):
    """The disk was full: it was said once and clearly, older checkpoints stay, nothing is left over."""
    assert said == [failure]
    assert "step-00000200 was not saved" in failure
    assert f"disk of {folder} is full" in failure
    assert "checkpoint.keep" in failure
    assert content_of(newest_verified(folder, pytest.fail)) == 100
    assert sorted(os.listdir(folder)) == ["latest", "step-00000100"]


def test_full_disk(tmp_path, monkeypatch):
    save(tmp_path, 100)
    said = []
    with monkeypatch.context() as patch:
        patch.setattr(under_test, "save_file", full_disk)
        failure = save(tmp_path, 200, said=said)
    expect_full_disk(tmp_path, failure, said)
    assert save(tmp_path, 300) is None


@pytest.mark.parametrize("call", range(1, 5))
def test_full_disk_at_any_later_moment(tmp_path, monkeypatch, call):
    save(tmp_path, 100)
    said, calls, fsync = [], [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) >= call:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        failure = save(tmp_path, 200, said=said)
    expect_full_disk(tmp_path, failure, said)


def test_full_disk_after_publishing_is_no_failure(tmp_path, monkeypatch):
    def full(path, data, write=under_test.write_aside):
        if path.name == "latest":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(under_test, "write_aside", full)
    said = []
    assert save(tmp_path, 200, said=said) is None
    assert content_of(newest_verified(tmp_path, pytest.fail)) == 200
    assert "step-00000200 is saved, but" in said[0]


@pytest.mark.lab
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a file system")
def test_full_disk_in_earnest(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    try:
        save(tmp_path, 100)
        said = []
        writer = checkpointer(tmp_path, said=said)
        writer.save(200, plain({"model/w": torch.zeros(1_000_000)}), {}, {})
        writer.wait()
        expect_full_disk(tmp_path, writer.failure, said)
        assert "needs 4.0 MB" in writer.failure
        assert save(tmp_path, 300) is None
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_write_that_does_not_come_back_is_a_failure(tmp_path, monkeypatch):
    def lies(tensors, path, write=under_test.save_file):
        write(tensors, path)
        flip_bit(Path(path))

    save(tmp_path, 100)
    monkeypatch.setattr(under_test, "save_file", lies)
    failure = save(tmp_path, 200)
    assert "not what comes back" in failure
    assert content_of(newest_verified(tmp_path, pytest.fail)) == 100


def test_a_folder_that_cannot_be_made_is_a_failure(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    failure = save(tmp_path / "checkpoints", 1)
    assert "step-00000001 was not saved" in failure


def test_a_disk_too_full_for_a_folder_is_a_failure(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", full)
        failure = save(tmp_path / "checkpoints", 1)
    assert f"disk of {tmp_path / 'checkpoints'} is full" in failure


def test_a_rank_that_fails_is_named_and_the_folder_is_removed(tmp_path, monkeypatch):
    save_all(tmp_path, 100)

    def fails(tensors, path, write=under_test.save_file):
        (full_disk if "rank-00001" in str(path) else write)(tensors, path)

    monkeypatch.setattr(under_test, "save_file", fails)
    said = []
    failures = save_all(tmp_path, 200, said=said)
    assert "rank 1: the disk of" in failures[0]
    assert "this rank's part of step-00000200 was not saved" in failures[1]
    assert failures[2] is None
    assert sorted(said) == sorted(failures[:2])
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000100"]


def test_a_rank_that_fails_gives_its_room_back_and_leaves_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(under_test, "save_file", full_disk)
    save(tmp_path, 200, rank=1, num_ranks=2)
    (folder,) = tmp_path.iterdir()
    assert os.listdir(folder) == ["rank-00001.failed"]
    assert "is full" in (folder / "rank-00001.failed").read_text()


# ---- Kills -----------------------------------------------------------------------------------------------------------


def kill_at(moment, torn):
    """From now on, the call number `moment` of those that change the disk kills this process before it is done.

    `torn`: what was about to be synced then is lost by half, as in a power cut.
    """
    calls = [0]

    def dying(original, name):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == moment:
                if torn and name == "fsync":
                    path = os.readlink(f"/proc/self/fd/{args[0]}")
                    if os.path.isfile(path):
                        os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in DISK_CALLS:
        setattr(os, name, dying(getattr(os, name), name))


def in_child(work):
    """Runs `work` in a forked process; returns whether it lived to its end."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(3)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), f"the child failed: {status}"
    return status == 0


def prepared(folder, steps):
    shutil.rmtree(folder, ignore_errors=True)
    for step in steps:
        assert save(folder, step, keep=9) is None


def recovers(folder, allowed, keep):
    """After a kill: what is called complete is so, the newest is one of those allowed, and the next save is as ever."""
    assert not [problem for path in complete(folder) for problem in verify(path)]
    content = content_of(newest_verified(folder, lambda _: None))
    assert content in allowed, (content, allowed)
    assert save(folder, 900, attempt="next", keep=keep) is None
    assert content_of(newest_verified(folder, pytest.fail)) == 900
    extra = [name for name in os.listdir(folder) if ".tmp-" in name or ".old-" in name or name.endswith(".aside")]
    assert not extra, extra


def torture_one_rank(folder, before, step, content, keep, torn):
    """Kills one save at every moment; returns how many moments there were."""
    template = folder / "template"
    prepared(template, before)
    for moment in range(1, 1000):
        run = folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(template, run)

        def work(run=run, moment=moment):
            kill_at(moment, torn)
            save(run, step, content=content, attempt="killed", keep=keep)

        survived = in_child(work)
        recovers(run, {content} if survived else {before[-1], content}, keep)
        if survived:
            return moment - 1
    raise AssertionError("the save never ended")


def torture_two_ranks(folder, victim):
    """Kills one of two ranks at every moment: rank 0 beside a rank 1 that goes on, rank 1 before rank 0 begins."""
    for moment in range(1, 1000):
        run = folder / "run"
        prepared(run, [100])

        def work(rank, run=run, moment=moment):
            if rank == victim:
                kill_at(moment, False)
            save(run, 200, rank=rank, num_ranks=2, attempt="killed", patience=0.05 if victim else 30)

        if victim:
            survived = in_child(lambda: work(1))
            assert in_child(lambda: work(0))
        else:
            other = os.fork()
            if other == 0:
                work(1)
                os._exit(0)
            survived = in_child(lambda: work(0))
            os.waitpid(other, 0)
        newest = newest_verified(run, pytest.fail)
        found = content_of(newest)
        assert found in ({200} if survived else {100, 200}), (moment, found)
        if victim and newest.name == "step-00000100":
            assert sorted(os.listdir(run)) == ["latest", "step-00000100"], "rank 0 removes what it cannot finish"
        recovers(run, {100, 200}, 2)
        if survived:
            return moment - 1
    raise AssertionError("the save never ended")


def torture_at_random(folder, rounds):
    """Kills a process that saves without pause, in one of its first dozen saves of large tensors; returns the last."""

    def big(step):
        return {"model/w": torch.full((1_500_000,), float(step)), "optimizer/step": torch.tensor(step)}

    def work(steps):
        writer = checkpointer(folder, attempt=f"from{steps[0]}")
        for step in steps:
            writer.save(step, plain(big(step)), {}, {"step": step})
        writer.wait()

    generator, last, began = random.Random(0), 3, time.monotonic()
    work(range(1, 4))
    seconds = (time.monotonic() - began) / 3
    for _ in range(rounds):
        child = os.fork()
        if child == 0:
            work(range(last + 1, 1_000_000))
        time.sleep(12 * seconds * generator.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        newest = newest_verified(folder, pytest.fail)
        found = empty_like(big(0))
        step = load(newest, plain(found), {}, 0, 1)["step"]
        assert step >= last
        last = step
        assert all(torch.equal(found[name], tensor) for name, tensor in big(step).items())
    return last


TORTURES = {
    "next step": lambda folder: torture_one_rank(folder, [100], 200, 200, 2, False),
    "next step, torn": lambda folder: torture_one_rank(folder, [100], 200, 200, 2, True),
    "next step, pruning": lambda folder: torture_one_rank(folder, [50, 100], 200, 200, 1, False),
    "same step": lambda folder: torture_one_rank(folder, [50, 100], 100, 101, 1, False),
    "same step, torn": lambda folder: torture_one_rank(folder, [50, 100], 100, 101, 1, True),
    "first of two ranks": lambda folder: torture_two_ranks(folder, 0),
    "second of two ranks": lambda folder: torture_two_ranks(folder, 1),
    "at random": lambda folder: torture_at_random(folder, 20),
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_at_any_moment_the_newest_complete_one_is_found(tmp_path):
    """One process for all tortures, because it forks: it must not have the threads of a test session.

    In memory where that is possible: a kill takes nothing that was written, synced or not (`torn` plays the power cut).
    """
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as folder:
        answer = subprocess.run(
            [sys.executable, __file__, folder],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    moments = json.loads(answer.stdout)
    assert moments.pop("at random") > 5
    assert min(moments.values()) >= 4, moments
    assert sum(moments.values()) >= 90, moments


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {}
    for title, torture in TORTURES.items():
        place = Path(sys.argv[1]) / title.replace(" ", "-")
        place.mkdir()
        results[title] = torture(place)
    print(json.dumps(results))
