"""`armillary train --resume RUN --plan ...` end to end: the run goes on under another plan as if nothing had been."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
CONFIG = """
[model]
dim = 24
num_layers = 3
num_heads = 3
vocab_size = 257
[data]
sequence_length = 32
batch_size = 6
tokenizer = "bytes"
held_out = 0.3
sources = [{path = "text"}]
cache = "cache"
[optim]
steps = 6
learning_rate = 1e-2
precision = "float64"
micro_batches = 3
[plan]
dp = 2
[checkpoint]
every = 3
[metrics]
wandb = "off"
"""


def armillary(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "armillary"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, env=os.environ, check=False)


def losses(folder: Path, run: str) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


@pytest.mark.slow
def test_a_run_is_resumed_under_another_plan(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / f"text/{number}.txt").write_text(f"{number}: the quick brown fox jumps over the lazy dog. " * 5)
    (tmp_path / "run.toml").write_text(CONFIG)
    done = armillary(tmp_path, "train", "run.toml", "--name", "whole")
    assert done.returncode == 0, done.stderr
    # The same run, as it was when it had been stopped after step 3.
    moved = tmp_path / "runs/moved"
    shutil.copytree(tmp_path / "runs/whole", moved)
    shutil.rmtree(moved / "checkpoints/step-00000006")
    (moved / "metrics.jsonl").unlink()
    done = armillary(tmp_path, "train", "--resume", "moved", "--plan", "tp=2,pp=2")
    assert done.returncode == 0, done.stderr
    assert "resumed at step 3 on 4 ranks" in done.stdout
    expected, found = losses(tmp_path, "whole"), losses(tmp_path, "moved")
    assert sorted(found) == [4, 5, 6]
    assert found == pytest.approx({step: expected[step] for step in found}, rel=1e-9)
    assert (moved / "checkpoints/latest").read_text().strip() == "step-00000006"
    assert "pp = 2" in (moved / "config.toml").read_text()
    # Another model is refused, with the sentence of the rank that sees it and no traceback.
    done = armillary(tmp_path, "train", "--resume", "moved", "--set", "model.num_layers=4")
    assert done.returncode == 2
    assert done.stderr.count("is not of this model and optimizer") == 1
    assert "Traceback" not in done.stderr
