"""The cache: a folder is whole or absent, made by one process, and what goes wrong is explained."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from armillary.train.data.cache import cache_folder, open_or_build


def build(folder: Path) -> dict[str, Any]:
    (folder / "numbers.txt").write_text("1 2 3")
    return {"count": 3}


def test_a_finished_folder_is_opened_and_not_made_again(tmp_path: Path) -> None:
    lines: list[str] = []
    made = open_or_build(tmp_path / "parts/a", build, lines.append)
    assert (made["count"], made["files"]["numbers.txt"]["size"]) == (3, 5)
    assert json.loads((tmp_path / "parts/a/manifest.json").read_text()) == made
    assert sorted(path.name for path in (tmp_path / "parts/a").iterdir()) == ["manifest.json", "numbers.txt"]

    def never(folder: Path) -> dict[str, Any]:
        raise AssertionError("made again")

    assert open_or_build(tmp_path / "parts/a", never, lines.append) == made
    assert not lines


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_everything_is_on_disk_before_the_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        events.append("renamed")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    open_or_build(tmp_path / "a", build, print)
    before = events[: events.index("renamed")]
    assert "numbers.txt" in before
    assert any(name.startswith(".manifest.json.") for name in before)
    assert events[-1] == tmp_path.name


KILLED = """
import os, signal, sys
from pathlib import Path
from armillary.train.data.cache import open_or_build
def build(folder):
    (folder / "numbers.txt").write_text("1 2")
    os.kill(os.getpid(), signal.SIGKILL)
open_or_build(Path(sys.argv[1]), build, print)
"""


def test_what_a_killed_process_left_is_ignored(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "a")], capture_output=True)
    assert done.returncode == -9, done.stderr
    assert len(list(tmp_path.glob(".a.*.tmp/numbers.txt"))) == 1
    assert not (tmp_path / "a").exists()
    open_or_build(tmp_path / "a", build, print)
    assert (tmp_path / "a/numbers.txt").read_text() == "1 2 3"
    assert not list(tmp_path.glob(".a.*.tmp"))


SLOW = """
import sys, time
from pathlib import Path
from armillary.train.data.cache import open_or_build
def build(folder):
    print("building")
    time.sleep(1.0)
    return {"words": 3}
print(open_or_build(Path(sys.argv[1]), build, print))
"""


def test_of_several_processes_one_works_and_the_others_wait(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW, str(tmp_path / "a")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len({output.splitlines()[-1] for output in outputs}) == 1
    assert sum("building" in output for output in outputs) == 1


def test_a_full_disk_is_explained_and_nothing_half_made_stays(tmp_path: Path) -> None:
    def full(folder: Path) -> dict[str, Any]:
        build(folder)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError) as caught:
        open_or_build(tmp_path / "parts/a", full, print)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.strerror == (
        f"the data cache {tmp_path / 'parts'} cannot be written (No space left on device); make room there, or set "
        "data.cache (or ARMILLARY_CACHE) to another folder"
    )
    assert [path.suffix for path in (tmp_path / "parts").iterdir()] == [".lock"]
    open_or_build(tmp_path / "parts/a", build, print)


def test_a_cache_that_is_a_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"the data cache .*file/parts cannot be written \(Not a directory\); make room"):
        open_or_build(tmp_path / "file/parts/a", build, print)


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ARMILLARY_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder("", lines.append) == tmp_path / "home/.cache/armillary"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("", lines.append) == tmp_path / "xdg/armillary"
    monkeypatch.setenv("ARMILLARY_CACHE", str(tmp_path / "own"))
    assert cache_folder("", lines.append) == tmp_path / "own"
    assert cache_folder("~/here", lines.append) == tmp_path / "home/here"
    assert not lines
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ARMILLARY_CACHE", str(tmp_path / "file/below"))
    assert cache_folder("", lines.append) == tmp_path / ".cache/armillary"
    assert lines == [
        f"{tmp_path}/file/below cannot be written; tokens are kept in {tmp_path}/.cache/armillary "
        "(ARMILLARY_CACHE or data.cache names another place)"
    ]
