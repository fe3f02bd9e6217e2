"""`report RUN`: everything that a run recorded, on one page that needs no network and no script.

It reads what lies in the run's folder and takes nothing there for granted: `metrics.jsonl` (metrics and events; the facts
`parameters`, `ranks`, `flops_per_token`, `peak_flops` (of all ranks) and `peak_origin` from its event "begin" or "resume"),
`config.toml`, `run.json` (versions and host, any shape) and `sample.txt`.
"""

import html
import io
import json
import math
import re
import statistics
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from armillary.train.metrics import FILE, REWINDS, Row, latest_per_step, read_metrics, redact
from armillary.train.status import duration, quantity
from armillary.train.store import write_aside

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = list[tuple[float, float]]

TROUBLE = ("skip", "rollback", "roll_back")
"""Events that the plots show in the colour of a warning."""
MOST_EVENTS = 100
"""Rows in the table of events."""
QUIET = ("open", "close", "begin")
"""Events that the table leaves out."""


@dataclass(frozen=True)
class Story:
    """A run as its folder tells it."""

    name: str
    rows: list[Row]
    """Metrics, one row for each step."""
    events: list[Row]
    facts: dict[str, Any]
    """Of the latest start: what MFU was computed from, the number of ranks and parameters."""
    total_steps: int | None
    seconds: float
    """Time in which the run was running."""
    starts: int
    config: str
    machine: Any
    sample: str


def write_report(run: Path) -> Path:
    """Writes `report.html` into the folder of a run and returns its path.

    Raises ValueError if the folder is not that of a run, OSError where the page cannot be written.
    """
    if not (run / FILE).is_file() and not (run / "config.toml").is_file():
        raise ValueError(f"{run}: is no run, it has neither {FILE} nor config.toml; name a folder such as runs/NAME")
    path = run / "report.html"
    write_aside(path, _page(_read(run)).encode("utf-8", "replace"))
    return path


def _read(run: Path) -> Story:
    rows = read_metrics(run / FILE) if (run / FILE).is_file() else []
    events = [row for row in rows if "event" in row]
    config, machine = _text(run / "config.toml"), _text(run / "run.json")
    try:
        steps = tomllib.loads(config).get("optim", {}).get("steps")
    except (tomllib.TOMLDecodeError, AttributeError):
        steps = None
    try:
        machine = json.loads(machine or "null")
    except (ValueError, RecursionError):
        pass
    started = [event for event in events if event["event"] in ("begin", "resume")]
    seconds, starts = _running(rows)
    return Story(
        name=run.resolve().name,
        rows=latest_per_step(rows),
        events=events,
        facts=started[-1] if started else {},
        total_steps=steps if isinstance(steps, int) else None,
        seconds=seconds,
        starts=starts,
        config=config,
        machine=machine,
        sample=_text(run / "sample.txt"),
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _running(rows: Sequence[Row]) -> tuple[float, int]:
    """Seconds from each start to the last word before the next one, together, and the number of starts."""
    total, starts, begin, last = 0.0, 0, None, 0.0
    for row in rows:
        now = _number(row.get("time"))
        if now is None:
            continue
        if begin is None or row.get("event") == "open":
            total += last - begin if begin is not None else 0.0
            starts, begin = starts + 1, now
        last = now
    return (total + last - begin if begin is not None else 0.0), starts


def _number(value: Any) -> float | None:
    """The value as a number that can be plotted, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        return None
    return float(value)


def _points(rows: Iterable[Row], name: str, along: str = "step") -> Points:
    """The finite values of a metric along another."""
    pairs = ((_number(row.get(along)), _number(row.get(name))) for row in rows)
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def _values(rows: Iterable[Row], name: str) -> list[float]:
    return [y for _, y in _points(rows, name)]


# Plots. Each colour is a stand-in that becomes a variable of the style sheet, so that a plot follows the page's theme.

MUTED, RULE, TRAIN, HELD, WARN = (f"#00000{digit}" for digit in range(1, 6))
VARIABLES = {MUTED: "muted", RULE: "rule", TRAIN: "train", HELD: "held", WARN: "warn"}


def _thin(points: Points, most: int = 300) -> Points:
    """At most two points for each of `most` stretches, the lowest and the highest, so that no spike is lost."""
    if len(points) <= 2 * most:
        return points
    bounds = [len(points) * i // most for i in range(most + 1)]
    parts = [points[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    return [p for part in parts for p in sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})]


def _smooth(points: Points) -> Points:
    """The mean over a fortieth of the points on each side of each; over fewer, evenly, near the ends."""
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    last, reach = len(points) - 1, len(points) // 40
    means = []
    for i, (x, _) in enumerate(points):
        half = min(reach, i, last - i)
        means.append((x, (sums[i + half + 1] - sums[i - half]) / (2 * half + 1)))
    return means


def _curve(axes: "Axes", points: Points) -> None:
    """A noisy metric: what was recorded, pale, and its running mean."""
    if not points:
        return
    if len(points) > 40:
        axes.plot(*zip(*_thin(points), strict=True), color=TRAIN, alpha=0.3, linewidth=0.9)
    mean = _smooth(points)
    shown = [*mean[:: len(mean) // 600 + 1], mean[-1]]
    axes.plot(
        *zip(*shown, strict=True), color=TRAIN, linewidth=1.7, marker="o" if len(points) < 4 else "", markersize=4
    )


def _line(axes: "Axes", points: Points) -> None:
    axes.plot(*zip(*_thin(points), strict=True), color=TRAIN, linewidth=1.7, marker="o" if len(points) < 4 else "")


def _range(axes: "Axes", values: Sequence[float], always: Sequence[float] = ()) -> None:
    """Show where `values` live, single spikes left out, and all of `always`."""
    ordered = sorted(values)
    cut = len(ordered) // 100
    low, high = min([*ordered[cut : cut + 1], *always]), max([*ordered[-1 - cut :][:1], *always])
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - room, high + room)


def _chart(label: str, draw: Callable[["Axes"], None], marks: Sequence[tuple[float, str]] = (), x: str = "step") -> str:
    """An SVG element of 420 by 220 units with what `draw` puts on the axes; `marks` are upright lines."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.size": 11}):
        # matplotlib's SVG has 72 units an inch.
        figure = Figure(figsize=(420 / 72, 220 / 72), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        for place, color in marks:
            axes.axvline(place, color=color, linewidth=1, linestyle=(0, (2, 2)), zorder=0.5)
        for axis, words in ((axes.xaxis, quantity), (axes.yaxis, "{:g}".format)):
            log = axis.get_scale() == "log"
            axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8) if log else MaxNLocator(5))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _, words=words: words(value)))
        axes.set_xlabel(x, color=MUTED)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(RULE)
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelcolor=MUTED, pad=5)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _clean_svg(file.getvalue(), label)


def _clean_svg(svg: str, label: str) -> str:
    """matplotlib's file as an element inside a page: the page's fonts and colours, no ids that clash, short numbers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"\d+\.\d+", lambda n: f"{float(n[0]):.1f}", path[0]), svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    return re.sub(r'width="[^"]*" height="[^"]*"', f'role="img" aria-label="{_esc(label)}"', svg, count=1)


def _losses(loss: Points, held: Points, log: bool = False) -> Callable[["Axes"], None]:
    def draw(axes: "Axes") -> None:
        if log:
            axes.set_xscale("log")
        _curve(axes, loss)
        if held:
            axes.plot(*zip(*held, strict=True), color=HELD, linewidth=1.2, marker="o", markersize=4.5, zorder=3)
        _range(axes, [y for _, y in loss], [y for _, y in [*loss[:1], *held]])

    return draw


def _from_zero(points: Points, noisy: bool = True) -> Callable[["Axes"], None]:
    def draw(axes: "Axes") -> None:
        _curve(axes, points) if noisy else _line(axes, points)
        _range(axes, [y for _, y in points], [0])
        axes.set_ylim(bottom=0)

    return draw


def _norms(points: Points) -> Callable[["Axes"], None]:
    """Norms of very unlike size get a logarithmic axis."""
    values = [y for _, y in points]

    def draw(axes: "Axes") -> None:
        _curve(axes, points)
        if min(values) > 0 and max(values) > 10 * statistics.median(values):
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)

    return draw


def _charts(story: Story) -> list[tuple[str, str, str]]:
    """Title, legend (HTML) and SVG of every plot there is data for."""
    rows, charts = story.rows, []
    colors = {**dict.fromkeys(REWINDS, MUTED), **dict.fromkeys(TROUBLE, WARN)}
    marks = [(float(e["step"]), colors[e["event"]]) for e in story.events if e["event"] in colors][-50:]
    loss, held = _points(rows, "train/loss"), _points(rows, "eval/loss")
    key = "".join(KEY.format(*k) for k in (("train", "training"), ("held", "held-out")) if (loss, held)[k[0] == "held"])
    if loss or held:
        charts.append(("Loss", key, _chart("loss by step", _losses(loss, held), marks)))
    loss, held = ([p for p in _points(rows, name, "train/tokens") if p[0] > 0] for name in ("train/loss", "eval/loss"))
    if len(loss) > 1:
        draw = _losses(loss, held, log=True)
        charts.append(("Loss by tokens", key, _chart("loss by tokens", draw, x="tokens, logarithmic")))
    if rate := _points(rows, "perf/tokens_per_sec"):
        charts.append(("Tokens per second", "", _chart("tokens per second", _from_zero(rate), marks)))
    if norm := _points(rows, "train/grad_norm"):
        charts.append(("Gradient norm", "", _chart("gradient norm", _norms(norm), marks)))
    if rates := _points(rows, "train/learning_rate"):
        charts.append(("Learning rate", "", _chart("learning rate", _from_zero(rates, noisy=False))))
    memory = _points(rows, "mem/peak_gib")
    if memory and max(y for _, y in memory) > 1.01 * min(y for _, y in memory):
        charts.append(("Peak memory, GiB", "", _chart("peak memory", _from_zero(memory, noisy=False))))
    return charts


# The page.

TITLES = {
    "finished": ("good", "Finished", "all {steps} steps"),
    "stopped": ("fair", "Stopped", "at step {step} of {steps}"),
    "failed": ("bad", "Failed", "at step {step} of {steps}"),
    "": ("fair", "No end on record", "last row at step {step} of {steps}: it still runs, or was killed"),
}
KEY = '<span class="key {}">{}</span>'


def _esc(value: object) -> str:
    """The value as text inside a page, without secrets."""
    return html.escape(redact(str(value)))


def _status(story: Story) -> str:
    """How the run ended, from its last words."""
    ends = [event for event in story.events if event["event"] in ("open", "close")]
    last = ends[-1] if ends else {}
    ending = last.get("status") if last.get("event") == "close" else ""
    tone, title, where = TITLES.get(ending if isinstance(ending, str) else "", TITLES[""])
    step = max([row["step"] for row in story.rows] or [0])
    words = where.format(step=f"{step:,}", steps="?" if story.total_steps is None else f"{story.total_steps:,}")
    message = f'<p class="message">{_esc(last["message"])}</p>' if last.get("message") else ""
    return f'<p class="status {tone}"><b>{title}</b> {_esc(words)}</p>{message}'


def _subtitle(story: Story) -> str:
    facts, parts = story.facts, []
    if parameters := _number(facts.get("parameters")):
        parts.append(f"{quantity(parameters)} parameters")
    if ranks := _number(facts.get("ranks")):
        parts.append(f"{ranks:.0f} rank{'s' if ranks != 1 else ''}")
    times = [time for row in story.events if (time := _number(row.get("time"))) is not None]
    if times and 0 < times[0] < 1e11:
        parts.append(f"started {datetime.fromtimestamp(times[0], UTC):%Y-%m-%d %H:%M} UTC")
    return f'<p class="sub">{_esc(" · ".join(parts))}</p>' if parts else ""


def _figures(story: Story) -> str:
    """The tiles with the run's main numbers."""
    rows = story.rows
    tiles: list[tuple[str, str, str]] = []

    def fell(label: str, name: str, digits: int) -> None:
        if values := _values(rows, name):
            since = f"from {values[0]:.{digits}f} at the start" if len(values) > 1 else "evaluated once"
            tiles.append((label, f"{values[-1]:.{digits}f}", since))

    fell("Held-out loss", "eval/loss", 3)
    fell("Bits per byte", "eval/bits_per_byte", 3)
    if losses := _points(rows, "train/loss"):
        broken = sum(1 for row in rows if "train/loss" in row) - len(losses)
        note = f"step {losses[-1][0]:,.0f}" + (f"; {broken} not finite" if broken else "")
        tiles.append(("Training loss", f"{losses[-1][1]:.3f}", note))
    if tokens := _values(rows, "train/tokens"):
        tiles.append(("Tokens", quantity(max(tokens)), "trained on"))
    if story.starts:
        tiles.append(
            ("Wall time", duration(story.seconds), f"{story.starts} starts" if story.starts > 1 else "one start")
        )
    if rate := _values(rows, "perf/tokens_per_sec"):
        each = _values(rows, "perf/tokens_per_sec_per_rank")
        note = f"median; {quantity(statistics.median(each))} a rank" if each else "median"
        tiles.append(("Tokens per second", quantity(statistics.median(rate)), note))
    if mfu := _values(rows, "perf/mfu"):
        tiles.append(("MFU", f"{100 * statistics.median(mfu):.1f}%", "median"))
    if memory := _values(rows, "mem/peak_gib"):
        tiles.append(("Peak memory", f"{max(memory):.2f} GiB", "one rank"))
    cells = (f"<div><dt>{_esc(a)}</dt><dd>{_esc(b)}</dd><dd class=note>{_esc(c)}</dd></div>" for a, b, c in tiles)
    return f'<dl class="tiles">{"".join(cells)}</dl>' if tiles else "<p>No metrics were recorded.</p>"


def _mfu(story: Story) -> str:
    """MFU's formula with this run's numbers in it."""
    rate = _values(story.rows, "perf/tokens_per_sec")
    work, peak = _number(story.facts.get("flops_per_token")), _number(story.facts.get("peak_flops"))
    if not rate or not work or not peak or not _values(story.rows, "perf/mfu"):
        return ""
    text = (
        f"MFU = tokens per second × floating-point operations a token ÷ peak of all ranks = "
        f"{quantity(statistics.median(rate))}/s × {quantity(work)} ÷ {quantity(peak)}/s. "
        f"Peak: {story.facts.get('peak_origin', 'unknown')}."
    )
    return f'<p class="sub">{_esc(text)}</p>'


def _events(story: Story) -> str:
    shown = [event for event in story.events if event["event"] not in QUIET]
    if not shown:
        return ""
    rows = [(f"{e['step']:,}", str(e["event"]).replace("_", " "), e.get("message", "")) for e in shown[:MOST_EVENTS]]
    more = f"<p>{len(shown) - MOST_EVENTS} more in {FILE}.</p>" if len(shown) > MOST_EVENTS else ""
    return f"<h2>Events</h2>{_table(('Step', 'What', 'Message'), rows, 'events')}{more}"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], kind: str) -> str:
    top = "".join(f"<th>{_esc(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{_esc(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _all_metrics(story: Story) -> str:
    names = sorted({name for row in story.rows for name in row} - {"step", "time"})
    rows = []
    for name in names:
        if values := _values(story.rows, name):
            numbers = (values[0], values[-1], min(values), statistics.median(values), max(values))
            rows.append((name, *(f"{number:.4g}" for number in numbers)))
    return _table(("Metric", "First", "Last", "Lowest", "Median", "Highest"), rows, "numbers") if rows else ""


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Leaves of nested JSON with their dotted names."""
    if isinstance(value, dict) and value:
        return [leaf for key, inner in value.items() for leaf in _flat(inner, f"{name}.{key}" if name else str(key))]
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return [] if value is None else [(name, str(value))]


def _fold(title: str, content: str, opened: bool = False) -> str:
    """A part of the page that can be folded; nothing where there is no content."""
    return f"<details{' open' if opened else ''}><summary>{title}</summary>{content}</details>" if content else ""


def _page(story: Story) -> str:
    charts = "".join(
        f"<figure><figcaption>{title}<span>{key}</span></figcaption>{svg}</figure>"
        for title, key, svg in _charts(story)
    )
    sample = f'<pre class="sample">{_esc(story.sample)}</pre>' if story.sample else ""
    config = f"<pre>{_esc(story.config)}</pre>" if story.config else ""
    machine = _flat(story.machine)
    return PAGE.format(
        name=_esc(story.name),
        style=STYLE,
        head=_status(story) + _subtitle(story),
        figures=_figures(story) + _mfu(story),
        charts=f'<div class="charts">{charts}</div>' if charts else "",
        events=_events(story),
        sample=f"<h2>What the model writes</h2>{sample}" if sample else "",
        folds=_fold("Config", config)
        + _fold("Versions and host", _table(("Name", "Value"), machine, "facts") if machine else "")
        + _fold("All metrics", _all_metrics(story)),
    )


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{name} – Armillary</title>
<style>{style}</style>
</head>
<body>
<header><p class="sub">Armillary run</p><h1>{name}</h1>{head}</header>
<main>{figures}{charts}{events}{sample}<div class="folds">{folds}</div></main>
</body>
</html>
"""

STYLE = """
:root {
  --paper: #fcfcfa; --card: #fff; --ink: #1d1d1b; --muted: #6a6963; --rule: #e5e3dc;
  --train: #2f6296; --held: #c2581f; --warn: #b23a30; --good: #2f7d4f; --fair: #a8720c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #161615; --card: #1d1d1c; --ink: #ecebe7; --muted: #a3a19a; --rule: #363531;
    --train: #7db2e8; --held: #f0965c; --warn: #ef8077; --good: #6cc28f; --fair: #e0b050;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Inter, "Helvetica Neue", sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; -webkit-text-size-adjust: 100%;
}
h1 { margin: 0 0 .5rem; font-size: 1.75rem; line-height: 1.2; font-weight: 650; letter-spacing: -.01em; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.1rem; font-weight: 650; }
p { margin: .25rem 0; max-width: 46rem; }
.sub, .note, figcaption span { color: var(--muted); font-size: .875rem; }
.status::before { content: ""; display: inline-block; width: .6em; height: .6em; margin-right: .5em; border-radius: 50%;
  background: var(--tone); }
.good { --tone: var(--good); } .fair { --tone: var(--fair); } .bad { --tone: var(--warn); }
.message { padding-left: .75rem; border-left: 2px solid var(--rule); }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 1px; margin: 2rem 0 1rem; padding: 1px;
  background: var(--rule); border-radius: 8px; overflow: hidden; }
.tiles div { padding: .9rem 1rem; background: var(--card); }
dt { color: var(--muted); font-size: .875rem; } dd { margin: 0; }
dd:not(.note) { font-size: 1.5rem; line-height: 1.3; font-weight: 600; letter-spacing: -.01em; }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 2rem 2rem; margin-top: 2.5rem; }
figure { margin: 0; }
figcaption { display: flex; justify-content: space-between; margin-bottom: .4rem; font-weight: 600; }
figcaption span { font-weight: 400; }
.key { margin-left: 1em; }
.key::before { content: ""; display: inline-block; width: 1em; height: 3px; margin: 0 .4em .25em 0; border-radius: 2px;
  background: currentColor; }
.key.train::before { background: var(--train); } .key.held::before { background: var(--held); }
svg { display: block; width: 100%; height: auto; } svg text { font-family: inherit; }
svg * { stroke-linejoin: round; }
pre { margin: 0; padding: 1rem; background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  font: .8125rem/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; }
th, td { padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
th { color: var(--muted); font-weight: 500; }
.events td:nth-child(-n+2), .facts td:first-child, .numbers td { white-space: nowrap; }
.numbers :is(td, th):not(:first-child), .events :is(td, th):first-child { text-align: right; }
.folds { margin-top: 2.5rem; border-top: 1px solid var(--rule); }
details { border-bottom: 1px solid var(--rule); }
details[open] { padding-bottom: 1rem; }
summary { padding: .75rem 0; font-weight: 600; cursor: pointer; }
@media (max-width: 44rem) {
  body { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.4rem; }
  .tiles { grid-template-columns: repeat(2, 1fr); }
  .tiles div { padding: .75rem .8rem; }
  dd:not(.note) { font-size: 1.3rem; }
  .charts { grid-template-columns: minmax(0, 1fr); gap: 1.75rem; }
}
@media print { body { max-width: none; } figure, .tiles div { break-inside: avoid; } }
"""
