"""The command line end to end: real torchrun, real ranks, real files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from armillary.launch import cli

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
precision = "float64"
micro_batches = 3
[plan]
dp = 2
[checkpoint]
every = 2
[metrics]
wandb = "off"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a finished run `first`; its path has a space."""
    path = tmp_path_factory.mktemp("a folder")
    (path / "text").mkdir()
    for number in range(20):
        (path / f"text/{number}.txt").write_text(f"{number}: the quick brown fox jumps over the lazy dog. " * 5)
    (path / "run.toml").write_text(CONFIG)
    arguments = ["--name", "first", "--json", "first.json", "--set", "metrics.sample_prompt=the"]
    done = armillary(path, "train", "run.toml", *arguments)
    assert done.returncode == 0, done.stderr
    (path / "first.txt").write_text(done.stdout)
    return path


def armillary(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "armillary"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def here(folder, monkeypatch, capsys):
    """`armillary` in this process, for verbs that start no others: exit code, what it said, and what it complained."""
    monkeypatch.chdir(folder)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["armillary", *arguments])
        code = cli.run()
        return code, *capsys.readouterr()

    return run


def metrics(folder: Path, run: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path, run: str) -> dict[object, object]:
    return {row["step"]: row["train/loss"] for row in metrics(folder, run) if "train/loss" in row}


def test_a_run_leaves_its_files_and_says_where(folder):
    run, told = folder / "runs/first", (folder / "first.txt").read_text()
    for name in ("config.toml", "metrics.jsonl", "report.html", "sample.txt", "tokenizer.json", "run.json"):
        assert (run / name).is_file(), name
    assert (run / "checkpoints/latest").read_text().strip() == "step-00000006"
    assert "report: runs/first/report.html" in told
    assert "held-out loss" in told
    assert "\x1b" not in told
    assert (run / "sample.txt").read_text().startswith("the")
    assert list(losses(folder, "first")) == [1, 2, 3, 4, 5, 6]
    result = json.loads((folder / "first.json").read_text())
    assert (result["run"], result["plan"], result["step"]) == ("runs/first", "dp=2", 6)
    assert result["train/loss"] > result["eval/loss"] > 0


def test_evaluate_agrees_with_the_run(folder, here):
    code, _, told = here("evaluate", "first", "--json", "evaluation.json")
    assert code == 0, told
    found = json.loads((folder / "evaluation.json").read_text())
    last = [row for row in metrics(folder, "first") if "eval/loss" in row][-1]
    assert found["step"] == 6
    assert found["loss"] == pytest.approx(last["eval/loss"], rel=1e-9)
    assert found["bits_per_byte"] == pytest.approx(last["eval/bits_per_byte"], rel=1e-9)


def test_data_that_changed_is_refused(folder, here):
    (folder / "text/new.txt").write_text("a file that was not there before")
    try:
        code, _, told = here("evaluate", "first")
        assert code == 2
        assert "other data than the config names" in told
    finally:
        (folder / "text/new.txt").unlink()


def test_generate_continues_a_prompt_the_same_way_twice(here):
    first, second = (here("generate", "first", "fox ", "--tokens", "20", "--seed", "3") for _ in range(2))
    assert first == second
    assert first[0] == 0
    assert first[1].startswith("fox ")


def test_a_name_that_is_taken_is_refused(here):
    assert here("train", "run.toml", "--name", "first")[::2] == (
        2,
        "error: runs/first exists; continue it with `armillary train --resume runs/first`, or choose another --name\n",
    )


def unfinished(folder: Path, name: str) -> Path:
    """A copy of the run `first` as it was when it had been stopped after step 4."""
    run = folder / "runs" / name
    shutil.copytree(folder / "runs/first", run)
    shutil.rmtree(run / "checkpoints/step-00000006")
    (run / "metrics.jsonl").unlink()
    return run


def test_a_run_goes_on_under_another_plan_as_if_nothing_had_been(folder):
    run = unfinished(folder, "moved")
    done = armillary(folder, "train", "--resume", "moved", "--plan", "tp=2,pp=2")
    assert done.returncode == 0, done.stderr
    assert "resumed at step 4 on 4 ranks" in done.stdout
    expected = losses(folder, "first")
    assert losses(folder, "moved") == pytest.approx({step: expected[step] for step in (5, 6)}, rel=1e-9)
    assert (run / "checkpoints/latest").read_text().strip() == "step-00000006"
    assert "pp = 2" in (run / "config.toml").read_text()


def test_what_a_resumed_run_cannot_be_is_refused_by_a_rank_and_told_once(folder):
    """Another model, other data: with a sentence, no traceback, and a config that stays as it was."""
    run = unfinished(folder, "kept")
    before = (run / "config.toml").read_text()
    for change, sentence in (
        ("model.num_layers=3", "is not of this model and optimizer"),
        ("data.seed=9", "other data than the config names"),
    ):
        done = armillary(folder, "train", "--resume", "runs/kept", "--set", change, "--plan", "dp=1")
        assert done.returncode == 2
        assert done.stderr.count(sentence) == 1
        assert "Traceback" not in done.stderr
        assert (run / "config.toml").read_text() == before


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """On two ranks."""
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_the_same_config_under_torchrun(folder):
    """Two kinds of launcher, one command, the same losses bit for bit."""
    done = torchrun(folder, "--no-python", str(BIN / "armillary"), "train", "run.toml", "--name", "joined")
    assert done.returncode == 0, done.stderr
    assert losses(folder, "joined") == losses(folder, "first")


def test_torchrun_with_another_number_of_ranks_is_told_once(folder):
    done = torchrun(folder, "-m", "armillary.train", "run.toml", "--plan", "dp=3")
    assert done.returncode != 0
    assert done.stderr.count("error: plan (dp=3) needs 3 ranks, but 2 were started") == 1


def test_parity_is_a_command(folder):
    done = armillary(folder, "parity", "run.toml", "--plan", "tp=2", "--json", "parity.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "parity.json").read_text())
    assert found["ok"] is True
    assert found["ranks"] == 2
    assert "tp=2" in found["plan"]
    assert found["worst_error"] == max(found[f"{kind}_error"] for kind in ("loss", "gradient", "parameter")) < 1e-9
    assert found["worst_name"].split("/")[0] in ("loss", "gradient", "parameter")


def start_long_run(folder: Path, name: str, plan: str) -> subprocess.Popen[str]:
    """A run that has saved its first checkpoint and has thousands of steps before it."""
    command = [str(BIN / "armillary"), "train", "run.toml", "--name", name, "--plan", plan, "--set", "optim.steps=5000"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (folder / f"runs/{name}/checkpoints/latest").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail("\n".join(process.communicate()))
        time.sleep(0.05)
    return process


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("victim", ["a rank", "the launcher"])
def test_a_killed_rank_is_named_and_nothing_is_left_behind(folder, tmp_path, victim):
    name = victim.replace(" ", "-")
    run = folder / "runs" / name
    process = start_long_run(folder, name, "dp=2")
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
    if victim == "the launcher":
        # The run's folder is free again, and can be told from anywhere.
        done = armillary(tmp_path, "train", "--resume", str(run), "--set", "optim.steps=2", "--plan", "dp=1")
        assert done.returncode == 0, done.stderr


def test_an_interrupt_says_how_to_go_on(folder):
    process = start_long_run(folder, "stopped", "dp=1")
    process.send_signal(signal.SIGINT)
    said, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "error: stopped by SIGINT" in told
    assert "Continue with: armillary train --resume runs/stopped" in told
    assert "report: runs/stopped/report.html" in said


def test_help_answers_at_once(folder):
    started = time.perf_counter()
    assert "train" in armillary(folder, "--help").stdout
    assert time.perf_counter() - started < 3  # 0.2 s on an idle machine; this one is shared


def test_two_runs_at_once_do_not_meet(folder):
    command = [str(BIN / "armillary"), "train", "run.toml", "--set", "data.seed=7", "--plan", "dp=1", "--name"]
    runs = [
        subprocess.Popen([*command, name], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for name in ("left", "right")
    ]
    for process in runs:
        _, told = process.communicate(timeout=120)
        assert process.returncode == 0, told
