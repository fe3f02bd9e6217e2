"""`report RUN`: everything that a run recorded, on one page that needs no network and no script."""

import html
import re
import statistics
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from armillary.launch.plots import brief, charts_of
from armillary.launch.story import Story, number_of, points_of, read_story, values_of
from armillary.train.files import write_aside
from armillary.train.observe.metrics_file import FILE, redact
from armillary.train.words import duration, quantity

MOST_EVENTS = 100
"""Rows in the table of events."""
QUIET = ("open", "close", "begin")
"""Events that the table leaves out."""


def write_report(run: Path) -> Path:
    """Writes `report.html` into the folder of a run and returns its path.

    Raises ValueError if the folder is not that of a run, OSError where the page cannot be written.
    """
    if not (run / FILE).is_file() and not (run / "config.toml").is_file():
        raise ValueError(f"{run}: is no run, it has neither {FILE} nor config.toml; name a folder such as runs/NAME")
    path = run / "report.html"
    write_aside(path, _page(read_story(run)).encode("utf-8", "replace"))
    return path


TITLES = {
    "finished": ("good", "Finished", ""),
    "stopped": ("fair", "Stopped", ""),
    "failed": ("bad", "Failed", ""),
    "": ("fair", "No end on record", ": it still runs, or was killed"),
}


def _esc(value: object) -> str:
    """The value as text inside a page, without secrets."""
    return html.escape(redact(str(value)))


def _status(story: Story) -> str:
    """How the run ended, from its last words."""
    ends = [event for event in story.events if event["event"] in ("open", "close")]
    last = ends[-1] if ends else {}
    tone, title, more = TITLES.get(str(last.get("status")), TITLES[""])
    step = max([row["step"] for row in story.rows] or [0])
    words = f"at step {step:,}" + ("" if story.total_steps is None else f" of {story.total_steps:,}") + more
    message = f'<p class="message">{_esc(last["message"])}</p>' if last.get("message") else ""
    return f'<p class="status {tone}"><b>{title}</b> {_esc(words)}</p>{message}'


def _subtitle(story: Story) -> str:
    parts = []
    if parameters := number_of(story.start.get("parameters")):
        parts.append(f"{quantity(parameters)} parameters")
    if ranks := number_of(story.start.get("ranks")):
        parts.append(f"{ranks:.0f} rank{'s' if ranks != 1 else ''}")
    times = [time for row in story.events if (time := number_of(row.get("time"))) is not None]
    if times and 0 < times[0] < 1e11:
        parts.append(f"started {datetime.fromtimestamp(times[0], UTC):%Y-%m-%d %H:%M} UTC")
    return f'<p class="sub">{_esc(" · ".join(parts))}</p>' if parts else ""


def _figures(story: Story) -> str:
    """The tiles with the run's main numbers."""
    rows = story.rows
    tiles: list[tuple[str, str, str]] = []

    def fell(label: str, name: str) -> None:
        if points := points_of(rows, name):
            step, value = points[0]
            since = f"from {value:.3f} at step {step:,.0f}" if len(points) > 1 else f"at step {step:,.0f}"
            tiles.append((label, f"{points[-1][1]:.3f}", since))

    fell("Held-out loss", "eval/loss")
    fell("Bits per byte", "eval/bits_per_byte")
    if losses := points_of(rows, "train/loss"):
        broken = sum(1 for row in rows if "train/loss" in row) - len(losses)
        note = f"step {losses[-1][0]:,.0f}" + (f"; {broken} not finite" if broken else "")
        tiles.append(("Training loss", f"{losses[-1][1]:.3f}", note))
    if tokens := values_of(rows, "train/tokens"):
        tiles.append(("Tokens", quantity(max(tokens)), f"up to step {rows[-1]['step']:,}"))
    if story.starts:
        note = f"{story.starts} starts" if story.starts > 1 else "one start"
        tiles.append(("Wall time", duration(story.seconds), note))
    if rate := values_of(rows, "perf/tokens_per_sec"):
        each = values_of(rows, "perf/tokens_per_sec_per_rank")
        note = f"median; {quantity(statistics.median(each))} a rank" if each else "median"
        tiles.append(("Tokens per second", quantity(statistics.median(rate)), note))
    if mfu := values_of(rows, "perf/mfu"):
        tiles.append(("MFU", f"{100 * statistics.median(mfu):.1f}%", "median"))
    if memory := values_of(rows, "mem/peak_gib"):
        tiles.append(("Peak memory", f"{max(memory):.2f} GiB", "one rank"))
    cells = (f"<div><dt>{_esc(a)}</dt><dd>{_esc(b)}</dd><dd class='note'>{_esc(c)}</dd></div>" for a, b, c in tiles)
    return f'<dl class="tiles">{"".join(cells)}</dl>' if tiles else "<p>No metrics were recorded.</p>"


def _mfu(story: Story) -> str:
    """MFU's formula with this run's numbers in it."""
    rate = values_of(story.rows, "perf/tokens_per_sec")
    work, peak = number_of(story.start.get("flops_per_token")), number_of(story.start.get("peak_flops"))
    if not (rate and work and peak and values_of(story.rows, "perf/mfu")):
        return ""
    work_words, peak_words = (re.sub(r"([kMGTPE]?)$", r" \1FLOP", quantity(number), count=1) for number in (work, peak))
    text = (
        f"MFU = tokens per second × floating-point operations of a token ÷ peak of all ranks = "
        f"{quantity(statistics.median(rate))}/s × {work_words} ÷ {peak_words}/s. "
        f"Peak: {story.start.get('peak_origin', 'unknown')}."
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
        if values := values_of(story.rows, name):
            numbers = (values[0], values[-1], min(values), statistics.median(values), max(values))
            rows.append((name, *map(brief, numbers)))
    return _table(("Metric", "First", "Last", "Lowest", "Median", "Highest"), rows, "numbers") if rows else ""


def _fold(title: str, content: str) -> str:
    """A part of the page that opens on demand; nothing where there is no content."""
    return f"<details><summary>{title}</summary>{content}</details>" if content else ""


def _page(story: Story) -> str:
    charts = "".join(
        f"<figure><figcaption>{title}<span>{key}</span></figcaption>{svg}</figure>"
        for title, key, svg in charts_of(story.rows, story.events)
    )
    return PAGE.format(
        name=_esc(story.name),
        style=STYLE,
        head=_status(story) + _subtitle(story),
        figures=_figures(story) + _mfu(story),
        charts=f'<div class="charts">{charts}</div>' if charts else "",
        events=_events(story),
        sample=f"<h2>What the model writes</h2><pre>{_esc(story.sample)}</pre>" if story.sample else "",
        folds=_fold("Config", f"<pre>{_esc(story.config)}</pre>" if story.config else "")
        + _fold("Versions and host", _table(("Name", "Value"), story.machine, "facts") if story.machine else "")
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
  font-variant-numeric: tabular-nums; overflow-wrap: break-word; -webkit-text-size-adjust: 100%;
}
h1 { margin: 0 0 .5rem; font-size: 1.75rem; line-height: 1.2; font-weight: 650; letter-spacing: -.01em; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.1rem; font-weight: 650; }
p { margin: .25rem 0; max-width: 46rem; }
.sub, .note, figcaption span { color: var(--muted); font-size: .875rem; }
.status::before { content: ""; display: inline-block; width: .6em; height: .6em; margin-right: .5em; border-radius: 50%;
  background: var(--tone); }
.good { --tone: var(--good); } .fair { --tone: var(--fair); } .bad { --tone: var(--warn); }
.message { padding-left: .75rem; border-left: 2px solid var(--rule); }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 1px; margin: 2rem 0 1rem;
  background: var(--card); border: 1px solid var(--rule); border-radius: 8px; overflow: hidden; }
.tiles div { padding: .9rem 1rem; box-shadow: 0 0 0 1px var(--rule); }
dt { color: var(--muted); font-size: .875rem; } dd { margin: 0; }
dd:not(.note) { font-size: 1.5rem; line-height: 1.3; font-weight: 600; letter-spacing: -.01em; }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 2rem 2rem; margin-top: 2.5rem; }
figure { margin: 0; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; margin-bottom: .4rem; font-weight: 600; }
figcaption > span { display: flex; flex-wrap: wrap; gap: 0 1em; font-weight: 400; }
.key::before { content: ""; display: inline-block; width: 1em; height: 3px; margin: 0 .4em .25em 0; border-radius: 2px;
  background: currentColor; }
.key.train::before { background: var(--train); } .key.held::before { background: var(--held); }
.key.warn::before, .key.muted::before { width: 2px; height: .8em; margin-bottom: -.1em; }
.key.warn::before { background: var(--warn); }
svg { display: block; width: 100%; height: auto; } svg text { font-family: inherit; } svg * { stroke-linejoin: round; }
pre { margin: 0; padding: 1rem; background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  font: .8125rem/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; }
th, td { padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
th { color: var(--muted); font-weight: 500; white-space: nowrap; }
td { overflow-wrap: anywhere; } :is(td, th):last-child { padding-right: 0; }
.events td:nth-child(-n+2) { overflow-wrap: normal; }
.facts td:first-child, .numbers td { overflow-wrap: normal; white-space: nowrap; }
.numbers :is(td, th):not(:first-child), .events :is(td, th):first-child { text-align: right; }
.folds { margin-top: 2.5rem; border-top: 1px solid var(--rule); }
details { border-bottom: 1px solid var(--rule); } details[open] { padding-bottom: 1rem; }
summary { padding: .75rem 0; font-weight: 600; cursor: pointer; }
@media (max-width: 44rem) {
  body { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.4rem; } dd:not(.note) { font-size: 1.3rem; }
  .tiles { grid-template-columns: repeat(2, 1fr); } .tiles div { padding: .75rem .8rem; }
  .charts { grid-template-columns: minmax(0, 1fr); gap: 1.75rem; }
}
"""
