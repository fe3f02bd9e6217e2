"""Plots of a run's metrics as SVG elements for a page.

Each colour is a stand-in that becomes a variable of the page's style sheet, so that a plot follows the page's theme.
"""

import html
import io
import logging
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from armillary.launch.story import Points, points_of, values_of
from armillary.train.observe.metrics_file import Row
from armillary.train.words import quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MUTED, RULE, TRAIN, HELD, WARN = (f"#00000{digit}" for digit in range(1, 6))
VARIABLES = {MUTED: "muted", RULE: "rule", TRAIN: "train", HELD: "held", WARN: "warn"}
MARKED = {"resume": MUTED, "skip": WARN, "rollback": WARN, "stop": WARN}
WORDS = {TRAIN: "training", HELD: "held-out", WARN: "trouble", MUTED: "resumed"}
KEY = '<span class="key {}">{}</span>'
METRICS = {
    "Tokens per second": "perf/tokens_per_sec",
    "Gradient norm": "train/grad_norm",
    "Learning rate": "train/learning_rate",
    "Peak memory, GiB": "mem/peak_gib",
}


def brief(number: float) -> str:
    """A figure of any size in few characters."""
    return quantity(number) if abs(number) >= 10_000 else f"{number:.4g}"


def _thin(points: Points, most: int = 300) -> Points:
    """At most two points for each of `most` stretches, the lowest and the highest, so that no spike is lost."""
    if len(points) <= 2 * most:
        return points
    parts = [points[len(points) * i // most : len(points) * (i + 1) // most] for i in range(most)]
    return [p for part in parts for p in sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})]


def _middle(points: Points, most: int = 300) -> Points:
    """The running median: over a fortieth of the points on each side of each; over fewer, evenly, near the ends."""
    last, reach = len(points) - 1, len(points) // 40
    # Evenly spread, and evenly on a logarithmic axis.
    places = {last * i // most for i in range(most + 1)} | {min(last, int(last ** (i / most))) for i in range(most)}
    middles = []
    for i in sorted(places):
        half = min(reach, i, last - i)
        near = points[i - half : i + half + 1 : half // 100 + 1]
        middles.append((points[i][0], statistics.median(y for _, y in near)))
    return middles


def _curve(axes: "Axes", points: Points) -> None:
    """A noisy metric: what was recorded, pale, and its running median."""
    if len(points) > 40 and axes.get_xscale() == "linear":
        axes.plot(*zip(*_thin(points), strict=True), color=TRAIN, alpha=0.3, linewidth=0.9)
    if points:
        dot = "o" if len(points) < 4 else ""
        axes.plot(*zip(*_middle(points), strict=True), color=TRAIN, linewidth=1.7, marker=dot, markersize=4)


def _range(axes: "Axes", points: Points, always: Points) -> None:
    """Show where `points` live, single spikes left out, and all of `always`."""
    ordered = sorted(y for _, y in points)
    cut = len(ordered) // 100
    ends = [*ordered[cut : cut + 1], *ordered[-1 - cut :][:1], *(y for _, y in always)]
    room = 0.06 * (max(ends) - min(ends)) or 0.05 * abs(max(ends)) or 1.0
    axes.set_ylim(min(ends) - room, max(ends) + room)


def _chart(
    label: str, draw: Callable[..., None], *data: Any, marks: Sequence[tuple[float, str]] = (), x: str = "step"
) -> str:
    """An SVG element of 420 by 220 units with what `draw` makes of the data; `marks` are upright lines."""
    # Of a home that cannot be written it would tell in two warnings, and do without.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.size": 12}):
        # matplotlib's SVG has 72 units an inch.
        figure = Figure(figsize=(420 / 72, 220 / 72), layout="constrained")
        axes = figure.add_subplot()
        draw(axes, *data)
        if max(axes.get_xlim()) - min(axes.get_xlim()) < 1:
            axes.set_xlim(min(axes.get_xlim()) - 1, max(axes.get_xlim()) + 1)
        for place, color in marks:
            axes.axvline(place, color=color, linewidth=1, linestyle=(0, (2, 2)), zorder=0.5)
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            log = LogLocator(subs=(1, 2, 5) if high < 2000 * low else (1,), numticks=8)
            plain = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=axis is axes.xaxis)
            axis.set_major_locator(log if axis.get_scale() == "log" else plain)
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _: brief(value)))
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
    svg = re.sub(r'<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->|<g id="[^"]*"/>', "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"\d+\.\d+", lambda n: f"{float(n[0]):.1f}", path[0]), svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    return re.sub(r'width="[^"]*" height="[^"]*"', f'role="img" aria-label="{html.escape(label)}"', svg, count=1)


def _draw_losses(axes: "Axes", loss: Points, held: Points, scale: str = "linear") -> None:
    axes.set_xscale(scale)
    _curve(axes, loss)
    if held:
        axes.plot(*zip(*held, strict=True), color=HELD, linewidth=0.8, marker="o", markersize=4.5, zorder=3)
    _range(axes, loss, [*loss[:1], *held])


def _draw_metric(axes: "Axes", points: Points, log: bool) -> None:
    """From zero, or with a logarithmic axis where `log` allows it and the values are very unlike in size."""
    _curve(axes, points)
    values = [y for _, y in points]
    if log and min(values) > 0 and max(values) > 10 * statistics.median(values):
        axes.set_yscale("log")
    else:
        _range(axes, points, [(0, 0)])
        axes.set_ylim(bottom=min(0, *values))


def charts_of(rows: Sequence[Row], events: Iterable[Row]) -> list[tuple[str, str, str]]:
    """Title, legend (HTML) and SVG of every plot there is data for; `rows` are metrics, one for each step."""
    charts = []
    marks = [(float(e["step"]), MARKED[e["event"]]) for e in events if e["event"] in MARKED][-50:]
    loss, held = points_of(rows, "train/loss"), points_of(rows, "eval/loss")
    if loss or held:
        seen = {color for _, color in marks} | ({TRAIN} if loss else set()) | ({HELD} if held else set())
        key = "".join(KEY.format(VARIABLES[color], word) for color, word in WORDS.items() if color in seen)
        charts.append(("Loss", key, _chart("loss by step", _draw_losses, loss, held, marks=marks)))
    losses = (points_of(rows, name, "train/tokens") for name in ("train/loss", "eval/loss"))
    loss, held = ([point for point in points if point[0] > 0] for points in losses)
    if len(loss) > 1:
        chart = _chart("loss by tokens", _draw_losses, loss, held, "log", x="tokens, logarithmic")
        charts.append(("Loss by tokens", "", chart))
    for title, name in METRICS.items():
        values = values_of(rows, name)
        if values and (name != "mem/peak_gib" or max(values) > 1.01 * min(values)):
            log = name == "train/grad_norm"
            charts.append((title, "", _chart(title.lower(), _draw_metric, points_of(rows, name), log, marks=marks)))
    return charts
