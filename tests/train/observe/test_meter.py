"""What a run records: strict, complete, robust to kills, and without secrets."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.train.observe.meter import Meter, MetricsConfig, NullMeter, speed
from armillary.train.observe.metrics_file import FILE, latest_per_step, read_metrics, redact
from armillary.train.observe.sinks import Sink

SECRET = "0123456789abcdef0123456789abcdef01234567"
PLAIN = MetricsConfig(wandb="off")


def meter(folder: Path, config: MetricsConfig = PLAIN, **facts: Any) -> tuple[Meter, list[str]]:
    notes: list[str] = []
    return Meter(folder, config, facts, notes.append), notes


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(folder / FILE) if row.get("event") not in ("open", "close")]


def strict(text: bytes) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


MODULES = ["train.observe.meter", "train.observe.status", "train.observe.peak", "launch.report"]


@pytest.mark.parametrize("module", MODULES)
def test_import_pulls_no_torch(module: str) -> None:
    heavy = "{'torch', 'numpy', 'pydantic', 'wandb', 'rich', 'matplotlib'}"
    code = f"import sys, armillary.{module}; print(sorted({heavy} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_rows_and_events_come_back_with_time(tmp_path: Path) -> None:
    recorder, _ = meter(tmp_path)
    recorder.log(1, {"train/loss": 8.25, "train/tokens": 4096})
    recorder.event(1, "skip", "not finite", batch=[3, 4])
    recorder.close("finished", "done")
    first, row, event, last = read_metrics(tmp_path / FILE)
    assert (row["train/loss"], row["train/tokens"], row["step"]) == (8.25, 4096, 1)
    assert row["time"] > 1.7e9
    assert "event" not in row
    assert (event["event"], event["message"], event["batch"]) == ("skip", "not finite", [3, 4])
    assert (first["event"], last["event"], last["status"], last["message"]) == ("open", "close", "finished", "done")


@settings(max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from(["train/loss", "eval/loss", "perf/mfu"]), st.floats() | st.integers(-(2**63), 2**63), max_size=3
    )
)
def test_every_number_survives_strict_json(tmp_path_factory: pytest.TempPathFactory, values: dict[str, float]) -> None:
    folder = tmp_path_factory.mktemp("run")
    recorder, _ = meter(folder)
    recorder.log(3, values)
    recorder.event(3, "skip", "", loss=math.nan, deep={"norms": [math.inf, 1.0]})
    recorder.close("finished")
    for line in (folder / FILE).read_bytes().splitlines():
        strict(line)
    row, event = metrics_of(folder)
    for name, value in values.items():
        assert row[name] == value or (math.isnan(value) and math.isnan(row[name]))
    assert math.isnan(event["loss"])
    assert event["deep"] == {"norms": ["inf", 1.0]}


def test_a_line_is_in_the_file_before_the_next_is_made(tmp_path: Path) -> None:
    recorder, _ = meter(tmp_path)
    recorder.log(1, {"train/loss": 1.0})
    assert metrics_of(tmp_path)[0]["train/loss"] == 1.0
    recorder.close("finished")


@pytest.mark.parametrize("half", [b'{"step": 2, "train/lo', b'{"step": 2}', b"\0" * 70_000])
def test_half_last_line_is_ignored_by_readers_and_cut_off_by_the_next_writer(tmp_path: Path, half: bytes) -> None:
    recorder, _ = meter(tmp_path)
    recorder.log(1, {"train/loss": 1.0})
    with (tmp_path / FILE).open("ab") as file:
        file.write(half)
    assert [row["step"] for row in metrics_of(tmp_path)] == [1]
    again, _ = meter(tmp_path)
    again.log(2, {"train/loss": 0.5})
    again.close("finished")
    assert half not in (tmp_path / FILE).read_bytes()
    assert [row["train/loss"] for row in metrics_of(tmp_path)] == [1.0, 0.5]


def test_a_file_of_one_half_line_becomes_a_good_one(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b'{"st')
    recorder, _ = meter(tmp_path)
    recorder.close("stopped")
    assert [row["event"] for row in read_metrics(tmp_path / FILE)] == ["open", "close"]


@pytest.mark.parametrize(
    "line",
    [
        b"rubbish",
        b"[1]",
        b'{"train/loss": 1}',
        b'{"step": true}',
        b'{"step": -1}',
        b'{"step": 1e3}',
        b'{"step": 1, "event": ["skip"]}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_a_broken_line_in_the_middle_is_told_and_hides_nothing(tmp_path: Path, line: bytes) -> None:
    (tmp_path / FILE).write_bytes(b'{"step": 7, "train/loss": 2}\n' + line + b'\n{"step": 8, "train/loss": 1}\n')
    first, broken, last = read_metrics(tmp_path / FILE)
    assert (first["train/loss"], last["train/loss"]) == (2, 1)
    assert (broken["event"], broken["step"]) == ("unreadable", 7)
    assert "line 2 of metrics.jsonl" in broken["message"]


def test_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / FILE)


def test_what_was_written_last_holds_key_by_key() -> None:
    rows = [{"step": 1, "a": 1}, {"step": 2, "a": 2}, {"step": 2, "b": 3}, {"step": 1, "a": 4}]
    assert latest_per_step(rows) == [{"step": 1, "a": 4}, {"step": 2, "a": 2, "b": 3}]


@pytest.mark.parametrize(
    ("event", "kept"),
    [
        ({"step": 3, "event": "resume"}, [0, 1, 2, 3, 4]),
        ({"step": 9, "event": "rollback", "to_step": 2}, [0, 1, 2, 4]),
        ({"step": 0, "event": "begin"}, [0, 4]),
        ({"step": 9, "event": "skip"}, [0, 1, 2, 3, 4, 5, 6]),
        ({"step": 9, "event": "rollback", "to_step": "two"}, [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_steps_after_the_one_gone_back_to_are_taken_back(event: dict[str, Any], kept: list[int]) -> None:
    rows: list[dict[str, Any]] = [*({"step": step, "eval/loss": 1} for step in range(7)), event, {"step": 4, "b": 2}]
    latest = latest_per_step(rows)
    assert [row["step"] for row in latest] == kept
    assert ("eval/loss" in next(row for row in latest if row["step"] == 4)) == (6 in kept)


def test_run_keeps_its_identity_when_it_goes_on(tmp_path: Path) -> None:
    for _ in range(3):
        meter(tmp_path)[0].close("stopped")
    opened = [row["run"] for row in read_metrics(tmp_path / FILE) if row["event"] == "open"]
    assert len(opened) == 3
    assert len(set(opened)) == 1


def test_other_ranks_record_nothing(tmp_path: Path) -> None:
    silent = NullMeter()
    silent.log(1, {"train/loss": 1.0})
    silent.event(1, "skip", "")
    silent.close("finished")
    assert not list(tmp_path.iterdir())


def test_full_disk_loses_rows_but_not_the_run(tmp_path: Path) -> None:
    import resource
    import signal

    recorder, notes = meter(tmp_path)
    recorder.log(1, {"train/loss": 1.0})
    size = (tmp_path / FILE).stat().st_size
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # Room for half a row: the first write comes back short, as on a disk that fills up.
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))
        recorder.log(2, {"train/loss": 2.0})
        recorder.log(3, {"train/loss": 3.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    recorder.log(4, {"train/loss": 4.0})
    recorder.close("finished")
    assert [row["train/loss"] for row in metrics_of(tmp_path)] == [1.0, 4.0]
    assert len(notes) == 1
    assert FILE in notes[0]
    assert "rows are lost" in notes[0]


def test_speed_is_tokens_over_seconds_and_mfu_a_fraction_of_the_peak() -> None:
    assert speed(4000, 2.0, 4, flops_per_token=6e6, peak_flops=48e9) == {
        "perf/tokens_per_sec": 2000.0,
        "perf/tokens_per_sec_per_rank": 500.0,
        "perf/step_time": 2.0,
        "perf/mfu": 0.25,
    }
    assert "perf/mfu" not in speed(4000, 2.0, 4, flops_per_token=6e6)


def test_rows_and_evaluations_are_due_when_the_config_says() -> None:
    config = MetricsConfig(every=3, evaluate_every=4)
    assert [step for step in range(1, 11) if config.row_due(step, 10)] == [3, 6, 9, 10]
    assert [step for step in range(11) if config.evaluation_due(step, 10)] == [0, 4, 8, 10]
    assert [step for step in range(11) if MetricsConfig().evaluation_due(step, 10)] == [0, 10]


def test_secrets_of_the_environment_are_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("SHORT_KEY", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "disabled")
    recorder, _ = meter(tmp_path)
    recorder.event(1, "failed", f"could not log in with {SECRET}", deep=[{SECRET: f"x{SECRET}"}])
    recorder.close("failed", SECRET)
    assert SECRET.encode() not in (tmp_path / FILE).read_bytes()
    assert redact("1 disabled") == "1 disabled"


class Broken:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name} here, key {os.environ['WANDB_API_KEY']}")


def test_failing_wandb_is_told_once_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setitem(sys.modules, "wandb", Broken())
    recorder, notes = meter(tmp_path, MetricsConfig(wandb="online"))
    recorder.log(1, {"train/loss": 1.0})
    recorder.close("finished")
    assert len(notes) == 1
    assert notes[0].startswith("metrics.wandb: wandb failed: RuntimeError: no Settings here")
    assert SECRET not in notes[0] + (tmp_path / FILE).read_text()
    assert [row.get("event") for row in metrics_of(tmp_path)] == ["warning", None]


def test_sink_that_fails_in_the_middle_is_not_asked_again(tmp_path: Path) -> None:
    recorder, notes = meter(tmp_path)
    asked: list[int] = []

    def log(step: int, values: Mapping[str, float]) -> None:
        asked.append(step)
        if step == 2:
            raise OSError("no route to host")

    recorder._sinks["wandb"] = Sink(log, lambda status: asked.append(-1))
    for step in (1, 2, 3):
        recorder.log(step, {"train/loss": 1.0})
    recorder.close("finished")
    assert asked == [1, 2]
    assert notes == [
        "metrics.wandb: wandb failed: OSError: no route to host. The run goes on with metrics.jsonl alone."
    ]


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_missing_package_is_named_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for module in ("wandb", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    wanted = MetricsConfig(wandb="online") if name == "wandb" else MetricsConfig(wandb="off", tensorboard=True)
    recorder, notes = meter(tmp_path, wanted)
    recorder.close("finished")
    assert len(notes) == 1
    assert f"metrics.{name}" in notes[0]
    assert f"pip install {name}" in notes[0]


def test_tensorboard_gets_the_rows(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recorder, notes = meter(tmp_path, MetricsConfig(wandb="off", tensorboard=True))
    for step in (1, 2):
        recorder.log(step, {"train/loss": 4.0 / step})
    recorder.event(2, "skip", "not finite")
    recorder.close("finished")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 4.0), (2, 2.0)]
    assert [e.value for e in events.Scalars("ft/skip")] == [1.0]
    assert not notes


WANDB_RUN = """
import os, sys
from pathlib import Path
from armillary.train.observe.meter import Meter, MetricsConfig
key = os.environ["WANDB_API_KEY"]
meter = Meter(Path(sys.argv[1]), MetricsConfig(project="a project"), {"model": {"dim": 64}, "note": key})
for step in (1, 2, 1):
    meter.log(step, {"train/loss": 4.0 / step, "eval/loss": float("nan")})
meter.event(2, "skip", "key " + key)
meter.close("finished")
"""


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_records_offline_in_silence_and_keeps_no_key(tmp_path: Path) -> None:
    environment = os.environ | {"WANDB_API_KEY": SECRET, "WANDB_CACHE_DIR": str(tmp_path / "cache")}
    folder = tmp_path / "a run"
    folder.mkdir()
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", WANDB_RUN, str(folder)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    identity = read_metrics(folder / FILE)[0]["run"]
    records = list((folder / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert records
    for text in (b"train/loss", b"a project", b"ft/skip"):
        assert all(text in record.read_bytes() for record in records)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
