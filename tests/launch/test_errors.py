"""Golden error messages: what a person reads when they give something wrong, to the letter, and the exit code 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from armillary.launch import cli
from armillary.launch.ranks import start_ranks
from armillary.train.failure import RunStopped, describe

RUN = """
[model]
dim = 16
num_layers = 1
num_heads = 2
vocab_size = 257
[data]
tokenizer = "bytes"
cache = "cache"
sources = [{ path = "text.txt" }]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a good config and its data."""
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(RUN)
    Path("text.txt").write_text("the quick brown fox " * 50)
    return tmp_path


def run(capsys, monkeypatch, *arguments: str) -> tuple[int, str]:
    """Exit code and standard error of `armillary *arguments`."""
    monkeypatch.setattr(sys, "argv", ["armillary", *arguments])
    return cli.run(), capsys.readouterr().err


SUFFIXES = (
    ".c, .cc, .cpp, .css, .cu, .cuh, .go, .h, .hpp, .html, .ini, .java, .js, .json, .jsonl, .md, .ndjson, .parquet, .py, "
    ".pyi, .rs, .rst, .sh, .sql, .tex, .text, .toml, .ts, .txt, .yaml, .yml"
)

MOST = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 200_000_000

CASES: dict[str, tuple[list[str], str]] = {
    "no config": (
        ["train"],
        "give either a CONFIG or --resume RUN; for example: armillary train configs/demo.toml",
    ),
    "config and resume": (
        ["train", "run.toml", "--resume", "x"],
        "give either a CONFIG or --resume RUN; for example: armillary train configs/demo.toml",
    ),
    "missing config": (
        ["train", "ran.toml"],
        "ran.toml: there is no such config file; did you mean run.toml?",
    ),
    "not TOML": (
        ["train", "text.txt"],
        "text.txt: is not valid TOML: Expected '=' after a key in a key/value pair (at line 1, column 5)",
    ),
    "unknown key": (
        ["train", "run.toml", "--set", "optim.learning_rat=1"],
        "--set: optim.learning_rat: unknown key; did you mean optim.learning_rate?",
    ),
    "unknown degree": (
        ["train", "run.toml", "--plan", "zz=2"],
        "--plan: plan.zz: unknown key; allowed here: pp, dp, cp, tp, schedule, stages_per_rank, in_flight, layers, split, recompute, compile, verify, context, context_backward, context_level, placement",
    ),
    "a plan that is none": (
        ["train", "run.toml", "--plan", "dp"],
        '--plan dp: write it as degree=number, for example "dp=2"',
    ),
    "more ranks than there is room for": (
        ["train", "run.toml", "--plan", "dp=1000000"],
        f"plan: its degrees need 1000000 ranks, and this machine has memory for at most {MOST}, even without a model; "
        "lower them, or start the ranks on several machines with torchrun",
    ),
    "a result that cannot be written": (
        ["train", "run.toml", "--json", "nowhere/a.json"],
        "--json nowhere/a.json: cannot be written; give a file in a folder that exists and can be written",
    ),
    "a name for an old run": (
        ["train", "--resume", "x", "--name", "y"],
        "--name y: a resumed run keeps its name; leave --name out",
    ),
    "a number without end": (
        ["train", "run.toml", "--set", "optim.learning_rate=inf"],
        "--set: optim.learning_rate: must be a finite number; it is inf",
    ),
    "wrong kind": (
        ["train", "run.toml", "--set", "optim.steps=1.5"],
        "--set: optim.steps: should be a valid integer; it is 1.5",
    ),
    "out of bounds": (
        ["train", "run.toml", "--set", "data.held_out=1"],
        "--set: data.held_out: must be less than 1; it is 1.0",
    ),
    "heads that do not divide": (
        ["train", "run.toml", "--set", "model.num_heads=3"],
        "--set: model.num_heads: must divide model.dim = 16, or set model.head_dim",
    ),
    "malformed override": (
        ["train", "run.toml", "--set", "steps"],
        "--set steps: write it as section.key=value, for example optim.steps=100",
    ),
    "no such run": (
        ["train", "--resume", "nothing"],
        "nothing: is no run (it has no config.toml); there are no runs in ./runs; start one first",
    ),
    "evaluate no run": (
        ["evaluate", "nothing"],
        "nothing: is no run (it has no config.toml); there are no runs in ./runs; start one first",
    ),
    "run name with a slash": (
        ["train", "run.toml", "--name", "../x"],
        "--name '../x': use letters, digits, '.', '-' and '_' only, starting with a letter or digit",
    ),
    "vocabulary too small": (
        ["train", "run.toml", "--set", "model.vocab_size=100"],
        "model.vocab_size: 100 is too small for data.tokenizer = 'bytes', which has 257 entries; "
        "set model.vocab_size = 257 or more",
    ),
    "tokenizer too small": (
        ["train", "run.toml", "--set", "data.tokenizer=bpe:10"],
        '--set: data.tokenizer: is "bpe:10"; bpe: takes a vocabulary of 257 (the bytes and the end of a document) to 9999999, '
        'such as "bpe:4096"',
    ),
    "no such tokenizer": (
        ["train", "run.toml", "--set", "data.tokenizer=nowhere"],
        'data.tokenizer = "nowhere": there is no file nowhere; give "bpe:4096", "bytes", a tokenizer.json or a folder '
        "that holds one",
    ),
    "no such data": (
        ["train", "run.toml", "--set", 'data.sources=[{path="nowhere"}]'],
        'data.sources[0].path = "nowhere": there is no such file or folder; give a path, a glob, "stdlib" or "hub:NAME"',
    ),
    "a home of nobody": (
        ["train", "run.toml", "--set", 'data.sources=[{path="~nobody-here/x"}]'],
        'data.sources[0].path = "~nobody-here/x": there is no such file or folder; give a path, a glob, "stdlib" or "hub:NAME"',
    ),
    "no data in a folder": (
        ["train", "run.toml", "--set", 'data.sources=[{path="empty"}]'],
        'data.sources[0].path = "empty": nothing that can be read (no files); allowed are ' + SUFFIXES,
    ),
    "glob without a match": (
        ["train", "run.toml", "--set", 'data.sources=[{path="*.md"}]'],
        'data.sources[0].path = "*.md": no file matches; mend the glob, or quote it from the shell',
    ),
    "an empty file": (
        ["train", "run.toml", "--set", 'data.sources=[{path="empty.txt"}]'],
        'data.sources[0].path = "empty.txt": the corpus is empty: no file, line or row has any text; give files with text '
        "in them",
    ),
    "a broken line": (
        ["train", "run.toml", "--set", 'data.sources=[{path="broken.jsonl"}]'],
        "data.sources[0]: broken.jsonl, line 2: not JSON (Expecting value: line 2 column 1 (char 10)); write one object such "
        'as {"text": "..."} a line',
    ),
    "a missing field": (
        ["train", "run.toml", "--set", 'data.sources=[{path="other.jsonl"}]'],
        'data.sources[0]: other.jsonl, line 1: no field "text" but "body"; set data.sources[0].field to the name of the text',
    ),
    "a binary file": (
        ["train", "run.toml", "--set", 'data.sources=[{path="binary.txt"}]'],
        "data.sources[0]: binary.txt is not UTF-8 text but binary or of another encoding; convert it or leave it out",
    ),
    "an unknown suffix": (
        ["train", "run.toml", "--set", 'data.sources=[{path="image.png"}]'],
        'data.sources[0].path = "image.png": nothing that can be read (.png); allowed are ' + SUFFIXES,
    ),
    "a dtype that proves nothing": (
        ["parity", "run.toml", "--dtype", "float16"],
        "--dtype float16: allowed are float64 (the proof) and float32",
    ),
    "no such benchmark": (
        ["bench", "nothing"],
        "bench nothing: there is no such benchmark; there are: attention, compose, context, gpu, pipeline, sharding, train",
    ),
}


@pytest.mark.parametrize(
    "arguments",
    [
        ["foo"],
        ["evaluate"],
        ["generate", "x"],
        ["generate", "x", "y", "--tokens", "0"],
        ["parity", "run.toml", "--steps", "0"],
    ],
    ids=" ".join,
)
def test_a_mistake_in_the_usage_is_told_as_one(arguments, folder, capsys, monkeypatch):
    code, told = run(capsys, monkeypatch, *arguments)
    assert code == 2
    assert "Usage: " in told
    assert "not your mistake" not in told


@pytest.mark.parametrize("case", CASES)
def test_golden(case, folder, capsys, monkeypatch):
    Path("empty").mkdir()
    Path("empty.txt").write_text("")
    Path("broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    Path("other.jsonl").write_text('{"body": "fine"}\n')
    Path("binary.txt").write_bytes(b"\xff\xfe\x00\x01" * 100)
    Path("image.png").write_bytes(b"\x89PNG")
    arguments, message = CASES[case]
    assert run(capsys, monkeypatch, *arguments) == (2, f"error: {message}\n")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 64 PB"),
    ],
)
def test_out_of_memory_is_no_bug_and_has_a_remedy(error):
    failure = describe(error, rank=3)
    assert (failure.bug, failure.exit_code) == (False, 1)
    assert failure.message.startswith("rank 3 is out of memory: ")
    assert "lower data.batch_size" in failure.message


def test_the_frames_of_torchs_own_code_are_left_out():
    error = RuntimeError("first line\nException raised from f at a.cpp:1 (most recent call first):\nframe #0: g")
    assert describe(error).message == "RuntimeError: first line"


PRINTS = """
import os, sys, time
from armillary.train.failure import leave, make_streams_safe, say
make_streams_safe()
time.sleep(0.2)
for number in range(3):
    say("gr\\u00fc\\u00dfe \\u2211")
open("numbers", "w").write(str(os.open(os.devnull, os.O_RDONLY)))
leave(7)
"""


@pytest.mark.parametrize("shell", ["{0}", "{0} <&- >&- 2>&-", "{0} | true; exit ${{PIPESTATUS[0]}}"])
def test_a_process_prints_to_nobody_and_in_any_locale(tmp_path, shell):
    """Closed streams, a reader that has gone, and a locale without letters: no traceback, and the work is done."""
    (tmp_path / "prints.py").write_text(PRINTS)
    command = shell.format(f"'{sys.executable}' prints.py")
    settings = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout == ("gr??e ?\n" * 3 if shell == "{0}" else "")
    assert int((tmp_path / "numbers").read_text()) > 2


def test_a_machine_without_loopback_is_told(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr("socket.create_connection", refuse)
    with pytest.raises(RunStopped, match=r"over localhost \(.*unreachable\); bring the loopback device up"):
        start_ranks(1, "json", [])


def test_a_rank_number_alone_is_not_torchrun(folder, capsys, monkeypatch):
    """RANK may be left over in a shell; the verb then starts its own ranks, here after the first check."""
    monkeypatch.setenv("RANK", "0")
    code, told = run(capsys, monkeypatch, "train", "run.toml", "--plan", "dp=1000000")
    assert (code, told[:11]) == (2, "error: plan")
