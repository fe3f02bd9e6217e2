"""The command line end to end: real torchrun, real ranks, real files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
CONFIG = """
[model]
dim = 24
num_layers = 2
num_heads = 3
vocab_size = 257
[data]
sequence_length = 64
batch_size = 6
tokenizer = "bytes"
held_out = 0.3
sources = [{path = "text"}]
cache = "cache"
[optim]
steps = 6
learning_rate = 1e-2
precision = "float32"
[plan]
dp = 2
[checkpoint]
every = 2
[metrics]
wandb = "off"
sample_prompt = "the"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a finished run `first`; its path has a space."""
    path = tmp_path_factory.mktemp("a folder")
    (path / "text").mkdir()
    for number in range(20):
        (path / f"text/{number}.txt").write_text(f"{number}: the quick brown fox jumps over the lazy dog. " * 5)
    (path / "run.toml").write_text(CONFIG)
    done = armillary(path, "train", "run.toml", "--name", "first", "--json", "first.json")
    assert done.returncode == 0, done.stderr
    (path / "first.txt").write_text(done.stdout)
    return path


def armillary(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "armillary"), *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, env=os.environ | environment, check=False
    )


def metrics(folder: Path, run: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_files_and_says_where(folder):
    run, told = folder / "runs/first", (folder / "first.txt").read_text()
    for name in ("config.toml", "metrics.jsonl", "report.html", "sample.txt", "tokenizer.json", "run.json"):
        assert (run / name).is_file(), name
    assert (run / "checkpoints/latest").read_text().strip() == "step-00000006"
    assert "report: runs/first/report.html" in told
    assert "held-out loss" in told
    assert "\x1b" not in told
    assert (run / "sample.txt").read_text().startswith("the")
    assert [row["step"] for row in metrics(folder, "first") if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    result = json.loads((folder / "first.json").read_text())
    assert (result["run"], result["plan"], result["step"]) == ("runs/first", "dp=2", 6)
    assert result["train/loss"] > result["eval/loss"] > 0


def test_evaluate_agrees_with_the_run(folder):
    done = armillary(folder, "evaluate", "first", "--json", "evaluation.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "evaluation.json").read_text())
    last = [row for row in metrics(folder, "first") if "eval/loss" in row][-1]
    assert found["step"] == 6
    assert found["loss"] == pytest.approx(last["eval/loss"], rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(last["eval/bits_per_byte"], rel=1e-5)


def test_evaluate_refuses_data_that_changed(folder):
    (folder / "text/new.txt").write_text("a file that was not there before")
    try:
        done = armillary(folder, "evaluate", "first")
        assert done.returncode == 2
        assert "other data than the config names" in done.stderr
    finally:
        (folder / "text/new.txt").unlink()


def test_generate_continues_a_prompt_the_same_way_twice(folder):
    arguments = ["generate", "first", "fox ", "--tokens", "20", "--seed", "3"]
    first, second = (armillary(folder, *arguments) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert first.stdout.startswith("fox ")


def test_resume_needs_nothing_else(folder):
    done = armillary(
        folder, "train", "run.toml", "--name", "more", "--set", "optim.steps=2", "--set", "optim.warmup_steps=0"
    )
    assert done.returncode == 0, done.stderr
    done = armillary(folder, "train", "--resume", "more")
    assert done.returncode == 0, done.stderr
    assert "resumed at step 2" in done.stdout
    done = armillary(folder, "train", "--resume", "runs/more", "--set", "optim.steps=4", "--plan", "dp=3")
    assert done.returncode == 0, done.stderr
    assert (folder / "runs/more/checkpoints/latest").read_text().strip() == "step-00000004"
    assert "dp = 3" in (folder / "runs/more/config.toml").read_text()
    done = armillary(folder, "train", "--resume", "more", "--set", "data.seed=9")
    assert done.returncode == 2
    assert "other data than the config names" in done.stderr
    assert "seed = 9" not in (folder / "runs/more/config.toml").read_text()


def test_a_name_that_is_taken_is_refused(folder):
    done = armillary(folder, "train", "run.toml", "--name", "first")
    assert done.returncode == 2
    expected = (
        "error: runs/first exists; continue it with `armillary train --resume runs/first`, or choose another --name\n"
    )
    assert done.stderr == expected


def test_the_same_config_under_torchrun(folder):
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "armillary.train", "run.toml"]
    done = subprocess.run(
        [*command, "--name", "torchrun"], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    losses = [
        [row["train/loss"] for row in metrics(folder, run) if "train/loss" in row] for run in ("first", "torchrun")
    ]
    assert losses[0] == losses[1]


def test_the_verb_joins_the_ranks_that_torchrun_started(folder):
    """Two kinds of launcher, one command."""
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "--no-python", str(BIN / "armillary")]
    done = subprocess.run(
        [*command, "train", "run.toml", "--plan", "cp=2", "--name", "joined"],
        cwd=folder, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 ranks" in done.stdout
    assert [row for row in metrics(folder, "joined") if "train/loss" in row]


def test_torchrun_with_another_number_of_ranks_is_told_once(folder):
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "3", "-m", "armillary.train", "run.toml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert done.stderr.count("error: plan (dp=2) needs 2 ranks, but 3 were started") == 1


def test_parity_is_a_command(folder):
    done = armillary(folder, "parity", "run.toml", "--plan", "dp=3", "--json", "parity.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "parity.json").read_text())
    assert found["ok"] is True
    assert (found["ranks"], found["plan"]) == (3, "dp=3")
    assert found["worst_error"] == max(found[f"{kind}_error"] for kind in ("loss", "gradient", "parameter")) < 1e-9
    assert found["worst_name"].split("/")[0] in ("loss", "gradient", "parameter")


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("victim", ["a rank", "the launcher"])
def test_a_killed_rank_is_named_and_nothing_is_left_behind(folder, victim):
    name = victim.replace(" ", "-")
    command = [str(BIN / "armillary"), "train", "run.toml", "--name", name, "--set", "optim.steps=5000"]
    run = folder / "runs" / name
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (run / "checkpoints/latest").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1] if victim == "a rank" else process.pid, signal.SIGKILL)
    _, told = process.communicate(timeout=60)
    if victim == "a rank":
        assert process.returncode == 1
        assert "rank 1 was ended by SIGKILL" in told
        assert "Traceback" not in told
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]
    assert armillary(folder, "train", "--resume", name, "--set", "optim.steps=2").returncode == 0


def test_an_interrupt_says_how_to_go_on(folder):
    command = [str(BIN / "armillary"), "train", "run.toml", "--name", "stopped", "--set", "optim.steps=5000"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (folder / "runs/stopped/checkpoints/latest").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "error: stopped by SIGINT" in told
    assert "Continue with: armillary train --resume runs/stopped" in told
    assert "report: runs/stopped/report.html" in said


def test_a_run_resumes_from_another_folder(folder, tmp_path):
    done = subprocess.run(
        [str(BIN / "armillary"), "train", "--resume", str(folder / "runs/first")],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_help_answers_at_once(folder):
    started = time.perf_counter()
    assert "train" in armillary(folder, "--help").stdout
    assert time.perf_counter() - started < 3  # 0.2 s on an idle machine; this one is shared


def test_two_runs_at_once_do_not_meet(folder):
    command = [str(BIN / "armillary"), "train", "run.toml", "--set", "data.seed=7", "--name"]
    runs = [
        subprocess.Popen([*command, name], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for name in ("left", "right")
    ]
    for process in runs:
        _, told = process.communicate(timeout=120)
        assert process.returncode == 0, told
