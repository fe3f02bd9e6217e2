"""The folder of checkpoints: which are complete, which is used, and how they come and go."""

import errno
import os
import subprocess
import sys

import pytest
from checkpoint_helpers import newest_verified, numpy_checkpoint

from armillary.train.checkpoint.store import complete, prune, publish, sweep


def test_imports_no_torch():
    code = "import sys, armillary.train.checkpoint.store; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_newest_first_and_only_complete_ones(checkpoints):
    for name in ("step-00000300.tmp-a-1", "step-12", "other"):
        (checkpoints / name).mkdir()
    numpy_checkpoint(checkpoints / "step-00000200.old-a-1", 200)
    numpy_checkpoint(checkpoints / "step-100000000", 100000000)
    assert [path.name for path in complete(checkpoints)] == [
        "step-100000000",
        "step-00000200",
        "step-00000200.old-a-1",
        "step-00000100",
    ]
    assert complete(checkpoints / "nowhere") == []


def test_a_damaged_one_is_reported_and_the_one_before_is_used(checkpoints):
    (checkpoints / "step-00000200" / "manifest.json").unlink()
    said = []
    assert newest_verified(checkpoints, said.append).name == "step-00000100"
    assert len(said) == 1
    assert "step-00000200" in said[0]
    assert "manifest.json is missing" in said[0]


def test_none_is_sound(checkpoints, tmp_path_factory):
    for folder in complete(checkpoints):
        (folder / "rank-00000.safetensors").unlink()
    said = []
    assert newest_verified(checkpoints, said.append) is None
    assert len(said) == 2
    assert newest_verified(tmp_path_factory.mktemp("empty"), said.append) is None


@pytest.mark.parametrize("content", ["step-00000100\n", "step-99999999\n", "../..\n", ""])
def test_the_pointer_is_not_believed(checkpoints, content):
    (checkpoints / "latest").write_text(content)
    assert newest_verified(checkpoints, pytest.fail).name == "step-00000200"


def test_publish_replaces_the_same_step(checkpoints):
    unfinished = numpy_checkpoint(checkpoints / "step-00000200.tmp-a-1", 200, value=7)
    published = publish(unfinished, 200)
    assert published.name == "step-00000200"
    assert [path.name for path in complete(checkpoints)][:2] == ["step-00000200", "step-00000200.old-a-1"]
    assert prune(published, keep=2) == [checkpoints / "step-00000200.old-a-1"]
    assert sorted(os.listdir(checkpoints)) == ["step-00000100", "step-00000200"]


def test_publish_that_fails_puts_the_old_one_back(checkpoints, monkeypatch):
    unfinished = numpy_checkpoint(checkpoints / "step-00000200.tmp-a-1", 200, value=7)
    rename = os.rename

    def fails(source, target):
        if source == unfinished:
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="No space left"):
        publish(unfinished, 200)
    assert sorted(os.listdir(checkpoints)) == ["step-00000100", "step-00000200", "step-00000200.tmp-a-1"]


@pytest.mark.parametrize(
    ("published", "keep", "left"),
    [(300, 1, [300]), (300, 2, [200, 300]), (300, 9, [100, 200, 300]), (150, 1, [150]), (150, 2, [100, 150])],
)
def test_prune_keeps_the_published_and_those_before(checkpoints, published, keep, left):
    folder = numpy_checkpoint(checkpoints / f"step-{published:08d}", published)
    prune(folder, keep)
    assert sorted(os.listdir(checkpoints)) == [f"step-{step:08d}" for step in left]


def test_sweep_removes_what_others_left_but_not_a_save_in_progress(checkpoints):
    for name in ("other-9", "mine-1", "mine-2", "mine-3"):
        (checkpoints / f"step-00000300.tmp-{name}").mkdir()
    (checkpoints / ".latest.123.aside").touch()
    sweep(checkpoints, "mine", 2)
    assert sorted(os.listdir(checkpoints)) == [
        "step-00000100",
        "step-00000200",
        "step-00000300.tmp-mine-2",
        "step-00000300.tmp-mine-3",
    ]
