"""Failures: what a person is told of them, by which exit code, and that a rank's reason is never lost."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from armillary.train import failure as module
from armillary.train.failure import ERRORS_FOLDER, Failure, RunStopped, describe, guarded


class OutOfMemoryError(RuntimeError):
    """As torch's is called."""


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("error", "message", "exit_code"),
    [
        (ValueError("a.b: is 1; give 2"), "a.b: is 1; give 2", 2),
        (RunStopped("step 3 diverged"), "step 3 diverged", 1),
        (FULL, "[Errno 28] No space left on device: the disk is full; free some space, then try again", 2),
        (
            OutOfMemoryError("4 GiB"),
            "rank 3 is out of memory: 4 GiB\nRaise optim.micro_batches or plan.dp, or lower",
            1,
        ),
    ],
)
def test_what_a_person_can_act_on_is_told_in_a_sentence(error: Exception, message: str, exit_code: int) -> None:
    found = describe(error, 3)
    assert found.message.startswith(message)
    assert (found.rank, found.exit_code, found.bug, found.follows) == (3, exit_code, False, False)


def test_a_bug_of_ours_is_told_by_its_kind() -> None:
    found = describe(KeyError("x"))
    assert (found.message, found.exit_code, found.bug) == ("KeyError: 'x'", 1, True)


def test_a_lost_neighbour_is_no_reason_of_its_own() -> None:
    found = describe(RuntimeError("Connection closed by peer [127.0.0.1]:1\nException raised from a.cpp"), 2)
    assert found.follows
    assert "a.cpp" not in found.message
    assert not found.bug
    assert "rank 2 lost its connection to another rank, which failed first" in found.message


def failing() -> None:
    raise ValueError("a.b: is 1; give 2")


def test_the_launcher_finds_the_whole_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ERRORS_FOLDER, str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    assert guarded(failing, False) == 2
    (file,) = tmp_path.iterdir()
    found = Failure(**json.loads(file.read_text()))
    assert (file.name, found.rank, found.message) == ("rank-1.json", 1, "a.b: is 1; give 2")
    assert "in failing" in found.traceback
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_where_nothing_can_be_left_the_rank_speaks_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, debug: bool
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    monkeypatch.setenv(ERRORS_FOLDER, str(tmp_path / "gone"))
    monkeypatch.setenv("RANK", rank)
    assert guarded(failing, debug) == 2
    told = capsys.readouterr().err
    assert told.endswith("error: a.b: is 1; give 2\n")
    assert ("Traceback" in told) == debug
    # Rank 0 speaks first, so that torchrun ends the others before they repeat it.
    assert waited == ([] if rank == "0" else [module.SECONDS_FOR_THE_FIRST])


def interrupted() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("main", "code"), [(lambda: None, 0), (interrupted, 130)])
def test_other_ends(main: Callable[[], None], code: int) -> None:
    assert guarded(main, False) == code
