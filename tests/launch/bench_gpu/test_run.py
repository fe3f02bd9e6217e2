"""`armillary bench gpu`: a dry run goes every way that a real one goes, and where it cannot run it says so."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from armillary.kernels.attention.configs import KERNELS, block_config
from armillary.kernels.attention.mask import Mask
from armillary.launch.bench_gpu import attention, candidates, compare, layers, processes, sections, shards, timing
from armillary.launch.bench_gpu import run as bench_gpu
from armillary.launch.bench_gpu.attention import cases, document_lengths
from armillary.launch.bench_gpu.sections import SECTIONS, Section, complete, finite, run_job
from armillary.launch.bench_gpu.targets import LENGTH, TARGETS
from armillary.launch.bench_gpu.timing import Setting, measure
from armillary.train.files import write_aside

ROOT = Path(__file__).parents[3]

MISSING = "pydantic datasets wandb xxhash tomli_w tensorboard"
BLOCK = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {MISSING.split()!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, as on a card's machine: no installation of ours, and nothing that training needs."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(BLOCK)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), str(ROOT / ".pkg")]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def armillary(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)


@pytest.mark.slow
def test_a_dry_run_goes_every_way(bare: Path) -> None:
    pytest.importorskip("triton")
    done = armillary("armillary.launch", "bench", "gpu", "--dry-run", "--json", "dry.json")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((bare / "dry.json").read_text())
    rows = result["rows"]
    assert not [row for row in rows if not row["ok"] or row["measured"] or not row["dry"]]
    assert {"name", "seconds", "ratio", "bytes", "note", "section"} <= set.intersection(*map(set, rows))
    assert [section["name"] for section in result["sections"]] == [section.name for section in SECTIONS]
    assert all(any(row["section"] == section.name for row in rows) for section in SECTIONS)
    assert {row["kernel"] for row in rows if row["section"] == "candidates"} == set(KERNELS)
    assert result["notes"]["flop"].startswith("as in the FlashAttention papers: 4 *")
    timed = [row for row in rows if row["section"] == "attention"]
    assert all({"flash", "flex"} <= row["peers"].keys() for row in timed)
    assert all(row["bytes"] > 0 and row["tflops"] > 0 for row in timed)
    assert not (bare / "docs").exists()
    assert done.stdout.count("FAILED") == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
@pytest.mark.parametrize("module", [("armillary.launch", "bench", "gpu"), ("armillary.launch.bench_gpu.run",)])
def test_without_a_gpu_one_sentence(bare: Path, module: tuple[str, ...]) -> None:
    pytest.importorskip("triton")
    done = armillary(*module)
    assert done.returncode == 2
    assert done.stderr == (
        "error: bench gpu: this needs an NVIDIA GPU, and torch finds none; --dry-run shows what would be run\n"
    )
    assert not (bare / "docs").exists()


def test_an_unknown_section_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no section 'speed'; there are: device, correctness"):
        bench_gpu.measure(1, None, dry=True, only=["speed"])


def run_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, seconds: float = 60) -> bench_gpu.Run:
    """One section whose process is `program`; OUT is the file of its rows, FIRST the jobs that are done."""
    monkeypatch.setattr(processes, "GRACE", 0.0)

    def command(self: processes.Process, left: float) -> list[str]:
        return [sys.executable, "-c", program.replace("OUT", repr(str(self.out))).replace("FIRST", str(self.first))]

    monkeypatch.setattr(processes.Process, "command", command)
    run = bench_gpu.Run(False, 1, lambda run: write_aside(tmp_path / "x.json", str(len(run.rows)).encode()), tmp_path)
    bench_gpu._run(run, [Section("device", seconds)], seconds=seconds)
    return run


ROW = '{"name": "a", "section": "device", "ok": true, "seconds": 1, "ratio": 1, "note": ""}'
WRITE = "import os, time, subprocess; file = open(OUT, 'a'); write = lambda text: (file.write(text), file.flush()); "


def test_after_a_process_that_dies_another_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As after a kernel that reads where it may not: the job is told, and those after it are done."""
    jobs = [f'{{"job": {n}, "name": "job {n}", "section": "device"}}\\n' for n in (1, 2, 3)]
    program = WRITE + f"row = '{ROW}\\n'\n"
    program += f"if FIRST == 0: write('{jobs[0]}' + row + '{jobs[1]}' + '{{\"name\": '); os.abort()\n"
    program += f"write('\\n{jobs[2]}' + row)"
    run = run_with(monkeypatch, tmp_path, program)
    assert [(row["name"], row["ok"]) for row in run.rows] == [("a", True), ("a", True), ("job 2", False)]
    assert run.rows[2]["error"] == "the process of part 0/1 ended early: -6"
    assert not run.sections[0]["ok"]
    assert bench_gpu.failed({"sections": run.sections})
    assert (tmp_path / "x.json").read_text() == "3"


def test_a_process_that_cannot_begin_is_not_begun_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = run_with(monkeypatch, tmp_path, f"open(OUT + '.began', 'a').write('x'); exit({sections.BROKEN})")
    assert [row["name"] for row in run.rows] == ["its start"]
    assert (tmp_path / "device-0.began").read_text() == "x"


def test_a_process_that_never_ends_is_ended_with_what_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = WRITE + f"write('{ROW}\\n'); child = subprocess.Popen(['sleep', '300']); "
    program += "open(OUT + '.pid', 'w').write(str(child.pid)); time.sleep(300)"
    began = time.monotonic()
    run = run_with(monkeypatch, tmp_path, program, seconds=4)
    assert time.monotonic() - began < 30
    assert run.rows[1]["error"].endswith("killed, since its time was up")
    state = Path(f"/proc/{(tmp_path / 'device-0.pid').read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_without_time_a_section_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = run_with(monkeypatch, tmp_path, "", seconds=-1)
    assert [row["error"] for row in run.rows] == ["not run: the time of the command was up"]
    assert not run.sections[0]["ok"]


def test_jobs_that_were_done_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And the card that a job lost is not used for the next one."""
    done: list[str] = []
    jobs = [(name, lambda name=name: done.append(name) or [{"name": name}]) for name in "abc"]
    monkeypatch.setattr(sections.importlib, "import_module", lambda _: SimpleNamespace(jobs=lambda setting: jobs))
    monkeypatch.setattr(sections, "make_ready", lambda dry: None)
    options = ["device", "--dry-run", "--out", str(tmp_path / "rows")]
    assert sections.main([*options, "--first", "1"]) == 0
    assert done == ["b", "c"]
    assert sections.main([*options, "--part", "1/2"]) == 0
    assert done == ["b", "c", "b"]
    monkeypatch.setattr(sections, "usable", lambda dry: False)
    assert sections.main(options) == sections.BROKEN
    assert done == ["b", "c", "b", "a"]
    lines = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [line.get("job") for line in lines[:4]] == [2, None, 3, None]


def test_what_is_checked_runs_beside_what_is_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before anything is timed, and what is timed has the card for itself."""
    rounds: list[list[tuple[str, bool]]] = []

    def run_together(processes: Any, seconds: float) -> None:
        rounds.append([(each.sections[0].name, each.prepare) for each in processes])
        for each in processes:
            each.out.write_text(ROW.replace("device", each.sections[0].name) + "\n")

    monkeypatch.setattr(bench_gpu, "run_together", run_together)
    monkeypatch.setattr(bench_gpu, "_processes", lambda: 2)
    monkeypatch.setattr(bench_gpu, "refuse_what_cannot_run", lambda dry, only: "NVIDIA H100 80GB HBM3")
    monkeypatch.chdir(tmp_path)
    result = bench_gpu.measure(3, None)
    checked = [("correctness", False)] * 2 + [("layer correctness", False)] * 2
    compiled = [("attention", True)] * 2
    timed = [[(name, False)] for name in ("attention", "layers", "candidates", "profile")]
    assert rounds == [[("device", False)], checked + compiled, *timed]
    assert len(result["rows"]) == 9
    assert not bench_gpu.failed(result)
    file = tmp_path / "docs/benchmarks/gpu-nvidia-h100-80gb-hbm3.json"
    assert json.loads(file.read_text())["rows"] == result["rows"]


def test_a_job_that_raises_is_a_row_and_one_without_time_too() -> None:
    def job() -> list[Any]:
        raise RuntimeError("out of\nresources")

    later = time.monotonic() + 60
    assert run_job("x", job, later) == [{"name": "x", "ok": False, "error": "RuntimeError: out of resources"}]
    assert run_job("x", list, time.monotonic() - 1)[0]["error"] == "not run: the time of the section was up"
    row = complete({"name": "x", "ok": False, "error": "no"}, "device", False)
    assert not row["measured"]
    assert complete({"name": "x"}, "device", False)["measured"]
    assert finite({"a": [float("nan"), 1.0], "b": (float("inf"),)}) == {"a": [None, 1.0], "b": [None]}


def test_all_sections_fit_into_the_time_of_the_command() -> None:
    assert bench_gpu.SECONDS < 9 * 60
    assert {section.name for section in SECTIONS if section.prepared} == {"attention", "layers", "candidates"}
    assert all(sections.importlib.import_module(f"armillary.launch.bench_gpu.{s.module}").jobs for s in SECTIONS)


def test_what_is_timed_has_a_target_where_the_issue_has_one() -> None:
    found = list(cases(dry=False))
    kinds = {(case.head_dim, case.kind) for case in found if case.seq == LENGTH and case.heads == case.kv_heads}
    assert {(head_dim, mask) for _, head_dim, mask in TARGETS} == kinds
    assert {case.batch * case.seq for case in found} == {16384}
    assert {case.seq for case in found} == {1024, 2048, 4096, 8192, 16384}
    assert {"packed", "window"} < {case.kind for case in found}
    assert len({case.name for case in found}) == len(found)


def test_flop_is_counted_as_in_the_papers() -> None:
    by_name = {case.name: case for case in cases(dry=False)}
    assert by_name["d128 full 8192"].flop() == 4 * 8192**2 * 128 * 16 * 2
    assert by_name["d128 causal 8192"].flop() == by_name["d128 full 8192"].flop() / 2
    window = by_name["d128 window 4096 of 16384"]
    pairs = sum(min(query + 1, 4096) for query in range(16384))
    assert window.flop() == 4 * 16 * 128 * pairs
    lengths = document_lengths(16384)
    assert sum(lengths) == 16384
    assert min(lengths) > 0


def test_a_turn_that_fails_is_told_and_the_others_are_timed() -> None:
    def bad() -> None:
        raise RuntimeError("cannot")

    times = measure({"a": lambda: time.sleep(0.01), "b": bad}, Setting(dry=True))
    assert times.errors == {"b": "RuntimeError: cannot"}
    assert times.seconds.keys() == {"a"}
    assert times.seconds["a"] >= 0.01


def test_the_rule_of_errors_finds_what_is_wrong() -> None:
    truth = torch.randn(50, dtype=torch.float64)
    peer = truth.float()
    good = compare.judge("x", ["out"], [peer], [peer], [truth], [peer.clone()])
    assert good["ok"]
    wrong = peer.clone()
    wrong[7] += 1e-5
    assert not compare.judge("x", ["out"], [wrong], [peer], [truth], [wrong])["ok"]
    unwritten = peer.clone()
    unwritten[3] = torch.nan
    assert not compare.judge("x", ["out"], [unwritten], [peer], [truth], [unwritten])["ok"]
    assert not compare.judge("x", ["out"], [peer], [peer], [truth], [wrong])["ok"]
    blind = torch.tensor([-torch.inf, 1.0], dtype=torch.float64)
    for lse, ok in ((blind.float(), True), (torch.tensor([0.0, 1.0]), False), (torch.tensor([-torch.inf, 1.1]), False)):
        assert compare.judge("x", ["lse"], [lse], [lse], [blind], [lse])["ok"] == ok


def test_shards_are_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(31, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 31, (9,), generator=generator)
    loss, *_ = shards.in_shards(hidden, weight, labels, 4, torch.ones(()).double())
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum"))
    with pytest.raises(RuntimeError, match="must match the size"):
        shards.in_shards(hidden, weight, labels[:3], 4, torch.ones(()).double())


class Event:
    """Of a card that is done when it is asked."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, after: "Event") -> float:
        return (after.time - self.time) * 1e3


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Setting:
    """The interpreter in a card's place: what a real run does around the kernels, with tiny sizes."""
    pytest.importorskip("triton")
    monkeypatch.setenv("ARMILLARY_KERNELS", "triton")
    monkeypatch.setattr(Setting, "device", property(lambda self: torch.device("cpu")))
    monkeypatch.setattr(Setting, "narrow", property(lambda self: torch.float16))
    monkeypatch.setattr(timing, "FLUSHED", 1 << 12)
    monkeypatch.setattr(timing, "WARM", 16)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **_: compiled(call, backend="eager"))
    return Setting(dry=False, repetitions=3)


def test_rows_of_attention(card: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LENGTH", 20)
    forward, backward = attention.run(attention.Case("d64 causal 20", 1, (20,), Mask(), 1, 1, 64), card)
    for row, target, factor in ((forward, 360, 1), (backward, 270, 2.5)):
        assert (row["target"], row["reached"], row["not_below_flash"]) == (target, False, False)
        assert row["flop"] == factor * 4 * 20 * 20 / 2 * 64
        assert row["tflops"] == pytest.approx(row["flop"] / row["seconds"] / 1e12)
        assert row["peers"]["flash"]["ratio"] == pytest.approx(row["peers"]["flash"]["seconds"] / row["seconds"])
        assert "error" in row["peers"]["cudnn"]
        assert row["repetitions"] == 5
        assert complete(row, "attention", False)["measured"]
        assert "target 360: MISSED" in sections.line(complete(forward, "attention", False))
    assert forward["agreement"] < 2e-3


def test_rows_of_candidates(card: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other kernel of the backward pass stands still; a configuration that fails is a row, and no failure."""
    launched = []

    def backward(*arguments: Any, configs: Any) -> None:
        launched.append(configs[0])
        if configs[0].num_stages == 3:
            raise RuntimeError("out of resource: shared memory")

    from armillary.kernels.attention import flash_triton

    monkeypatch.setattr(flash_triton, "backward", backward)
    shipped = block_config("query_gradient", 64, torch.float16, "sm_90")
    case = attention.Case("x", 1, (9,), Mask(), 1, 1, 64)
    rows = candidates.run("query_gradient", case, card)
    assert rows[0]["config"]["queries"] == shipped.queries
    failed = [row for row in rows if row["config"]["num_stages"] == 3]
    assert failed
    assert all(row["error"] == "RuntimeError: out of resource: shared memory" for row in failed)
    assert [row.get("ok", True) for row in rows] == [not (row["shipped"] and row in failed) for row in rows]
    assert len({row["name"] for row in rows}) == len(rows) > 4


def test_one_kernel_alone() -> None:
    pytest.importorskip("triton")
    from armillary.kernels.attention import flash_triton

    kernel = flash_triton.key_gradient_kernel
    with candidates._alone("query_gradient"):
        flash_triton.key_gradient_kernel[(1,)](1, x=2)
        assert flash_triton.key_gradient_kernel is not kernel
    assert flash_triton.key_gradient_kernel is kernel


def test_rows_of_layers(card: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "sizes", lambda setting, real, tiny: tiny)
    forward, backward = layers.norm(card, 1e9)
    assert (forward["bytes"], backward["bytes"]) == (2 * 8 * 32 * 2, 3 * 8 * 32 * 2)
    for row in (forward, backward):
        assert row["of_copy"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
        assert row["peers"].keys() == {"plain", "compiled"}
        assert row["ratio"] == min(peer["ratio"] for peer in row["peers"].values())
