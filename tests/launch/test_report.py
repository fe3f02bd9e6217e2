"""The page of a run: whole, safe and alone, whatever lies in the folder."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.launch.report import write_report
from armillary.train.observe.meter import Meter, MetricsConfig
from armillary.train.observe.metrics_file import FILE

VOID = {"meta", "link", "br", "path", "use", "rect", "line", "circle"}
FACTS = {
    "parameters": 4_512_000,
    "ranks": 4,
    "flops_per_token": 27e6,
    "peak_flops": 300e9,
    "peak_origin": "measured here",
}
HOSTILE = "</pre></svg><script>alert(1)</script>\"'<img src=http://x onerror=alert(2)>&amp;"


class Page(HTMLParser):
    """Parses a page; fails on tags that do not match, and gathers text, tags, attributes."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def page_of(run: Path) -> Page:
    path = write_report(run)
    assert path == run / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def figures(step: int) -> dict[str, float]:
    return {
        "train/loss": 2 + 6 * math.exp(-step / 20),
        "train/grad_norm": 1.0 + (step == 30) * 40,
        "train/learning_rate": 3e-4,
        "train/tokens": 4096 * step,
        "perf/tokens_per_sec": 4000.0,
        "perf/tokens_per_sec_per_rank": 1000.0,
        "perf/mfu": 0.36,
        "mem/peak_gib": 0.5 + step / 1000,
        "comm/bytes_gradients": 17_000_000,
    }


def make_run(folder: Path, last: int = 60, ending: Any = "finished") -> Path:
    """A plausible run of which 60 steps were asked for."""
    folder.mkdir(exist_ok=True)
    meter = Meter(folder, MetricsConfig(wandb="off"), {})
    meter.event(0, "begin", "4,512,000 parameters on 4 ranks", **FACTS)
    meter.log(0, {"eval/loss": 8.36, "eval/bits_per_byte": 3.9})
    for step in range(1, last + 1):
        meter.log(step, figures(step))
    meter.log(last, {"eval/loss": 2.5, "eval/bits_per_byte": 1.15})
    if ending:
        meter.close(ending, "rank 2: out of memory" if ending == "failed" else "")
    (folder / "config.toml").write_text("[optim]\nsteps = 60\n")
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of such a run."""
    run = make_run(tmp_path_factory.mktemp("runs") / "demo")
    source = write_report(run).read_text()
    assert not list(run.glob("*.aside")) + list(run.glob(".*"))
    return source


def write_rows(folder: Path, *rows: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_finished_run_is_told_in_full(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    (run / "sample.txt").write_text("def add(a, b):\n    return a + b\n")
    (run / "run.json").write_text(
        json.dumps({"python": "3.11.7", "versions": {"torch": "2.13.0"}, "command": ["a", "b"]})
    )
    page = page_of(run)
    for words in (
        "demo Finished at step 60 of 60",
        "4.51M parameters · 4 ranks · started 20",
        "Held-out loss 2.500 from 8.360 at step 0",
        "Bits per byte 1.150 from 3.900 at step 0",
        "Training loss 2.299 step 60",
        "Tokens 246k up to step 60",
        "Wall time 0:00 one start",
        "Tokens per second 4,000 median; 1,000 a rank",
        "MFU 36.0% median",
        "Peak memory 0.56 GiB one rank",
        "= 4,000/s × 27 MFLOP ÷ 300 GFLOP/s. Peak: measured here.",
        "def add(a, b): return a + b",
        "[optim] steps = 60",
        "versions.torch 2.13.0",
        "command a b",
        "comm/bytes_gradients 17M 17M 17M 17M 17M",
        "tokens, logarithmic",
    ):
        assert words in page.text
    assert page.tags.count("svg") == page.tags.count("figure") == 6
    assert "Events" not in page.text


def test_page_stands_alone(demo: str) -> None:
    page = Page(demo)
    assert not {"script", "iframe", "img", "object"} & set(page.tags)
    links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert not re.findall(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", demo)
    assert len(demo) < 200_000


def test_every_svg_reference_has_its_target_and_no_id_stands_twice(demo: str) -> None:
    page = Page(demo)
    ids = [value for name, value in page.attributes if name == "id"]
    used = {value[1:] for name, value in page.attributes if name == "xlink:href"}
    used |= {found for _, value in page.attributes for found in re.findall(r"url\(#([^)]*)\)", value)}
    assert used <= set(ids)
    assert len(ids) == len(set(ids))


def test_colours_follow_the_theme(demo: str) -> None:
    assert "prefers-color-scheme: dark" in demo
    used = set(re.findall(r"var\(--(\w+)\)", demo))
    light, dark = re.findall(r":root \{(.*?)\}", demo, flags=re.DOTALL)
    assert used - {"tone"} <= set(re.findall(r"--(\w+):", light)) == set(re.findall(r"--(\w+):", dark))
    assert not re.findall(r"(?:fill|stroke): #", demo)


@pytest.mark.parametrize(
    ("last", "ending", "words"),
    [
        (40, "stopped", "Stopped at step 40 of 60"),
        (12, "failed", "Failed at step 12 of 60 rank 2: out of memory"),
        (25, None, "No end on record at step 25 of 60: it still runs, or was killed"),
    ],
)
def test_how_a_run_ended(tmp_path: Path, last: int, ending: str | None, words: str) -> None:
    assert words in page_of(make_run(tmp_path / "demo", last, ending)).text


def test_a_run_that_goes_on_has_no_end_until_it_ends_again(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", 40, "stopped")
    meter = Meter(run, MetricsConfig(wandb="off"), {})
    meter.event(30, "resume", "resumed at step 30", **FACTS)
    assert "No end on record at step 30 of 60" in page_of(run).text
    meter.log(31, figures(31) | {"train/loss": math.nan})
    meter.event(31, "skip", "loss nan: the next batch is tried")
    meter.event(31, "checkpoint_failed", "No space left on device")
    meter.log(32, figures(32))
    meter.close("finished")
    page = page_of(run)
    for words in (
        "Finished at step 32 of 60",
        "2 starts",
        "step 32; 1 not finite",
        "30 resume resumed at step 30",
        "31 skip loss nan: the next batch is tried",
        "31 checkpoint failed No space left on device",
        "trouble",
    ):
        assert words in page.text


def test_time_between_two_starts_does_not_count(tmp_path: Path) -> None:
    rows = [(100, "open"), (160, None), (5000, "open"), (5060, None)]
    run = write_rows(
        tmp_path / "demo", *({"step": 1, "time": t} | ({"event": event} if event else {"a": 1}) for t, event in rows)
    )
    assert "Wall time 2:00 2 starts" in page_of(run).text


def test_no_rows_at_all(tmp_path: Path) -> None:
    page = page_of(write_rows(tmp_path / "demo"))
    assert "No metrics were recorded." in page.text
    assert "svg" not in page.tags


def test_a_run_that_failed_before_its_first_row(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[optim]\nsteps = 60\n")
    assert "No metrics were recorded." in page_of(tmp_path).text


@pytest.mark.filterwarnings("error")
def test_one_row(tmp_path: Path) -> None:
    page = page_of(write_rows(tmp_path / "demo", {"step": 1, "time": 1.8e9, **figures(1)}))
    assert "Training loss" in page.text
    assert page.tags.count("svg") == 4


@pytest.mark.filterwarnings("error")
def test_rows_that_are_not_finite(tmp_path: Path) -> None:
    bad = {"train/loss": None, "train/loss_text": "nan", "train/grad_norm": None, "train/grad_norm_text": "inf"}
    page = page_of(write_rows(tmp_path / "demo", *({"step": step, "time": 1.8e9, **bad} for step in range(5))))
    assert "svg" not in page.tags
    mixed = ({"step": step, "time": 1.8e9, **(bad if step % 2 else figures(step))} for step in range(1, 50))
    page = page_of(write_rows(tmp_path / "demo", *mixed))
    assert "25 not finite" in page.text
    assert "nan" not in page.text.lower().replace("finance", "")


def test_half_last_line_and_broken_line_are_no_trouble(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    with (run / FILE).open("ab") as file:
        file.write(b'rubbish\n{"step": 61, "train/l')
    assert "60 unreadable line 66 of metrics.jsonl is no row" in page_of(run).text


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = tmp_path / "<b>run"
    write_rows(
        run,
        {"step": 0, "time": 1.8e9, "event": "begin", "message": "", **FACTS, "peak_origin": HOSTILE, "ranks": HOSTILE},
        {"step": 1, "time": HOSTILE, HOSTILE: 2.0, "train/loss": HOSTILE, "perf/mfu": 0.5, "perf/tokens_per_sec": 9},
        {"step": 2, "time": 1.8e9, "train/loss": 3.0},
        {"step": 2, "time": 1.8e9, "event": HOSTILE, "message": HOSTILE},
        {"step": 2, "time": 1.8e9, "event": "skip", "message": {"a": [HOSTILE]}},
        {"step": 2, "time": 1.8e9, "event": "close", "status": HOSTILE, "message": HOSTILE + "\ud800\0"},
    )
    (run / "config.toml").write_text(f"# {HOSTILE}")
    (run / "sample.txt").write_bytes(HOSTILE.encode() + b"\xff\x00\x1b[2J")
    (run / "run.json").write_text(json.dumps({HOSTILE: {HOSTILE: [HOSTILE]}}))
    page = page_of(run)
    assert not {"script", "img", "b>run"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("alert(1)") >= 10


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '"words"', "[1, {}]", "null", "{}", "\ud800", '{"a": NaN}'])
def test_any_host_file_and_config_will_do(tmp_path: Path, text: str) -> None:
    write_rows(tmp_path / "demo", {"step": 1, "time": 1.0, "train/loss": 1.0})
    for name in ("run.json", "config.toml", "sample.txt"):
        (tmp_path / "demo" / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    assert "Training loss 1.000" in page_of(tmp_path / "demo").text


values = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
)
names = st.sampled_from([*figures(1), "eval/loss", "eval/bits_per_byte", "time", "to_step", "status", "message", "run"])
kinds = st.fixed_dictionaries(
    {}, optional={"event": st.sampled_from(["open", "close", "begin", "resume", "rollback", "x"])}
)
lines = st.builds(
    lambda step, values, event: {"step": step, **values, **event},
    st.integers(0, 5),
    st.dictionaries(names | st.sampled_from([*FACTS]), values, max_size=6),
    kinds,
)


@settings(max_examples=25, deadline=None)
@given(st.lists(lines, max_size=8))
def test_any_rows_make_a_page(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    page_of(write_rows(tmp_path_factory.mktemp("run"), *rows))


def test_secrets_of_the_environment_are_not_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    run = make_run(tmp_path / "demo")
    for name in ("config.toml", "sample.txt", "run.json"):
        (run / name).write_text('{"key": "0123456789abcdef"}')
    assert "0123456789abcdef" not in write_report(run).read_text()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no run, it has neither metrics\.jsonl nor config\.toml; name a folder"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="is no run"):
        write_report(tmp_path / "nowhere")


def test_reading_the_module_pulls_no_plotting() -> None:
    code = "import sys, armillary.launch.report; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
