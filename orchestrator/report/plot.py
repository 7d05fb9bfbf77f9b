"""Plots of timelines: one panel per worker, all with the same time and memory scales.

matplotlib draws them, since one library covers both formats without a browser or a network: a PNG, and an SVG
with real text, which an HTML page embeds without JavaScript. It is imported only when a plot is requested,
since it imports numpy, which nothing else in the parent needs.

The colors are those of Okabe and Ito, which color-blind readers can distinguish; each series also has its own
line style or marker, for print. Labels are next to what they label, moved only as far as needed to avoid
overlap, with a thin line to it.
"""

import io
import math
from collections.abc import Callable, Iterator
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from orchestrator.analysis.memory.timeline import PhaseSpan, Point, Timeline
from orchestrator.report.label_layout import Interval, Label, placed, spread
from schemas.record import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REQUIREMENT = "matplotlib>=3.8"

NVML, RESERVED, ALLOCATED, PEAK = "#D55E00", "#56B4E9", "#0072B2", "#000000"
INK, FAINT = "#333333", "#999999"
SHADES = {"prefill": "#8FCBB4", "decode": "#DDF1EA"}
OTHER_SHADES = ("#FFFFFF", "#EFEFEF")
"""Alternating, for phases in which nothing is timed."""

STYLE = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 8,
    "text.parse_math": False,  # a `$` in a model's name doesn't start a formula
    "svg.fonttype": "none",
    "svg.hashsalt": "qbench",
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.6,
}
SMALL = 7
"""Points, for labels within a panel."""

# The page, in inches.
WIDTH, LEFT, RIGHT = 11.0, 0.65, 2.0
TITLE, HEADER, PANEL, FOOTER = 0.3, 0.72, 1.5, 0.8
LANE = 0.16
"""Height of the strip below zero in each panel, with the names of cells."""
LINE = 0.135
"""Height of small text."""
DOTS_PER_INCH = 110
SHORTEST_LABELED = 0.003
"""A phase shorter than this is invisible, so it isn't labeled."""

GPU_KEY = (
    "Torch and the process are read at phase edges (markers); lines between them are straight. "
    "Black: torch's peak of allocated memory in a phase.\n"
)
KEY = "Green: timed phases, prefill darker than decode. Below each panel: the cell being measured."


class Scale(NamedTuple):
    """The scales shared by all panels."""

    from_s: float
    to_s: float
    top_bytes: float
    unit: str
    unit_bytes: int

    def interval(self, text: str, start_s: float, end_s: float) -> Interval:
        """The part of a span that is within the axis, in inches."""
        inches_per_s = (WIDTH - LEFT - RIGHT) / (self.to_s - self.from_s)
        start, end = ((max(at_s, self.from_s) - self.from_s) * inches_per_s for at_s in (start_s, end_s))
        return Interval(text, start, end)

    def show(self, value_bytes: float) -> str:
        """Whole MiB, or GiB with two decimals."""
        digits = 2 if self.unit == "GiB" else 0
        return f"{value_bytes / self.unit_bytes:,.{digits}f} {self.unit}"


def formats() -> dict[str, Callable[[list[Timeline], str], bytes]]:
    """File extension → function that draws that format."""
    return {".html": as_html, ".png": as_png}


def title(run: Run, name: str) -> str:
    """The heading of a plot: model, device and run."""
    models = dict.fromkeys(job.model.name for job in run.plan.jobs)
    devices = dict.fromkeys(cell.ready.device_name for cell in run.cells if cell.ready)
    device = run.environment.cpu if list(devices) == ["CPU"] else ", ".join(devices) or "an unknown device"
    return f"Memory of {', '.join(models)} on {device}, run {name}"


def as_png(drawn: list[Timeline], heading: str) -> bytes:
    """The plot as PNG. Raises `ModuleNotFoundError` without matplotlib."""
    return _rendered(drawn, heading, "png")


def as_html(drawn: list[Timeline], heading: str) -> bytes:
    """The plot as a self-contained page. Raises `ModuleNotFoundError` without matplotlib."""
    image = _rendered(drawn, heading, "svg").decode()
    # The page has its own doctype, and the image's contains a URL.
    image = image[image.index("<svg") :]
    name = escape(heading)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n<title>{name}</title>\n'
        "<style>body { margin: 1em; background: white } svg { max-width: 100%; height: auto }</style>\n"
        f'</head>\n<body>\n<div role="img" aria-label="{name}">\n{image}</div>\n</body>\n</html>\n'
    ).encode()


def _rendered(drawn: list[Timeline], heading: str, form: str) -> bytes:
    from matplotlib import style

    out = io.BytesIO()
    # Isolated from the user's matplotlibrc, in both directions.
    with style.context(["default", STYLE]):
        figure = _figure(drawn, heading)
        # Default metadata contains dates and URLs, so the same run would give another file each time.
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type") if form == "svg" else ("Software",))
        figure.savefig(out, format=form, dpi=DOTS_PER_INCH, metadata=nothing)
    return out.getvalue()


def _figure(drawn: list[Timeline], heading: str) -> "Figure":
    from matplotlib.figure import Figure

    height = TITLE + len(drawn) * (HEADER + PANEL) + FOOTER
    figure = Figure(figsize=(WIDTH, height))
    figure.text(LEFT / WIDTH, 1 - 0.22 / height, heading, fontsize=11, fontweight="bold", va="center")
    scale = _scale(drawn)
    for index, timeline in enumerate(drawn):
        bottom = height - TITLE - (index + 1) * (HEADER + PANEL)
        rectangle = (LEFT / WIDTH, bottom / height, 1 - (LEFT + RIGHT) / WIDTH, PANEL / height)
        axes = figure.add_axes(rectangle)
        _set_axes(axes, scale, last=index == len(drawn) - 1)
        _draw(axes, timeline, scale)
    key = GPU_KEY + KEY if any(timeline.on_gpu for timeline in drawn) else KEY
    figure.text(LEFT / WIDTH, 0.08 / height, key, fontsize=SMALL, color=INK)
    return figure


def _scale(drawn: list[Timeline]) -> Scale:
    to_s = max(timeline.end_s for timeline in drawn)
    from_s = min(timeline.first_known_s for timeline in drawn)
    # A small margin, so that the first figure isn't on the axis.
    from_s = max(0.0, from_s - 0.03 * (to_s - from_s))
    top_bytes = 1.08 * (max(timeline.highest_bytes for timeline in drawn) or 2**20)
    unit, unit_bytes = ("GiB", 2**30) if top_bytes >= 2 * 2**30 else ("MiB", 2**20)
    return Scale(from_s, max(to_s, from_s + 1e-3), top_bytes, unit, unit_bytes)


def _set_axes(axes: "Axes", scale: Scale, last: bool) -> None:
    top = scale.top_bytes / scale.unit_bytes
    axes.set_xlim(scale.from_s, scale.to_s)
    axes.set_ylim(-top * LANE / (PANEL - LANE), top)
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= top])
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set_ylabel(scale.unit)
    axes.grid(axis="y", color=FAINT, linewidth=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(color=FAINT, labelbottom=last)
    if last:
        axes.set_xlabel("seconds since the worker started")


def _draw(axes: "Axes", timeline: Timeline, scale: Scale) -> None:
    over = 1 + (HEADER - 0.22) / PANEL
    axes.text(0, over, timeline.label, transform=axes.transAxes, fontsize=9, fontweight="bold", va="top")
    _shade(axes, timeline.phases)
    _draw_series(axes, timeline, scale)
    _label_series(axes, timeline, scale)
    _label_phases(axes, timeline.phases, scale)
    _label_cells(axes, timeline, scale)


def _shade(axes: "Axes", phases: list[PhaseSpan]) -> None:
    for index, span in enumerate(phases):
        shade = SHADES.get(span.phase, OTHER_SHADES[index % 2])
        # The edge makes a prefill of a few milliseconds visible next to a long decode.
        edge = 0.6 if span.phase == "prefill" else 0
        low = LANE / PANEL
        axes.axvspan(span.start_s, span.end_s, ymin=low, color=shade, linewidth=edge, zorder=edge)


def _draw_series(axes: "Axes", timeline: Timeline, scale: Scale) -> None:
    def plot(series: list[Point], **look: object) -> None:
        held = (math.nan if point.held_bytes is None else point.held_bytes for point in series)
        ys = [value / scale.unit_bytes for value in held]
        axes.plot([point.at_s for point in series], ys, **look)  # type: ignore[arg-type]

    if timeline.allocated:
        allocated = [(point.held_bytes or 0) / scale.unit_bytes for point in timeline.allocated]
        times = [point.at_s for point in timeline.allocated]
        axes.fill_between(times, allocated, color=ALLOCATED, alpha=0.18, linewidth=0)
    plot(timeline.allocated, color=ALLOCATED, linewidth=1.1, marker=".", markersize=3.5)
    plot(timeline.reserved, color=RESERVED, linewidth=1.2, linestyle="--")
    plot(timeline.sampled, color=NVML, linewidth=1.0)
    plot(timeline.process, color=NVML, linestyle="none", marker="o", markersize=3.2, markerfacecolor="white")
    _draw_peaks(axes, timeline, scale)


def _draw_peaks(axes: "Axes", timeline: Timeline, scale: Scale) -> None:
    """Below the curves, so only peaks above them are visible; with a line from the highest to its label."""
    marked = [span for span in timeline.phases if span.peak_allocated_bytes]
    for span in marked:
        peak = (span.peak_allocated_bytes or 0) / scale.unit_bytes
        axes.plot([span.start_s, span.end_s], [peak, peak], color=PEAK, linewidth=1.4, zorder=1.5)
    if highest := _highest(marked):
        peak = (highest.peak_allocated_bytes or 0) / scale.unit_bytes
        axes.plot(
            [highest.end_s, timeline.end_s], [peak] * 2, color=PEAK, linewidth=0.5, linestyle=":", zorder=1.5
        )


def _highest(phases: list[PhaseSpan]) -> PhaseSpan | None:
    return max(phases, key=lambda span: span.peak_allocated_bytes or 0, default=None)


def _label_series(axes: "Axes", timeline: Timeline, scale: Scale) -> None:
    """To the right of the curves, each with its last figure."""
    ends = sorted(_series_ends(timeline), key=lambda end: end[1])
    inches_per_byte = (PANEL - LANE) / scale.top_bytes
    labels = [
        Label(text.format(scale.show(held)), LANE + held * inches_per_byte, LINE) for text, held, _ in ends
    ]
    for label, (_, held, color), at in zip(labels, ends, spread(labels, 0.0, PANEL), strict=True):
        axes.annotate(
            label.text,
            xy=(timeline.end_s, held / scale.unit_bytes),
            xytext=(18, 72 * (at - label.preferred)),
            textcoords="offset points",
            fontsize=SMALL,
            color=color,
            va="center",
            annotation_clip=False,
            bbox={"facecolor": "white", "linewidth": 0, "pad": 0.4},
            arrowprops=_leader(color, from_=(0, 0.5)),
        )


def _series_ends(timeline: Timeline) -> Iterator[tuple[str, int, str]]:
    """Label with a placeholder for the figure, the figure, and the color."""
    sampled = "NVML, whole device {}" if timeline.on_gpu else "resident set {}"
    for text, series, color in (
        (sampled, timeline.sampled, NVML),
        ("○ NVML, process {}", timeline.process, NVML),
        ("- - torch reserved {}", timeline.reserved, "#2A7FB0"),  # dark enough to read as text
        ("torch allocated {}", timeline.allocated, ALLOCATED),
    ):
        known = [point.held_bytes for point in series if point.held_bytes is not None]
        if known:
            yield text, known[-1], color
    highest = _highest(timeline.phases)
    if highest and highest.peak_allocated_bytes:
        yield f"torch peak {{}}, in {highest.phase}", highest.peak_allocated_bytes, PEAK


def _label_phases(axes: "Axes", phases: list[PhaseSpan], scale: Scale) -> None:
    """Above the panel, with lines down to them."""
    width = WIDTH - LEFT - RIGHT
    for label, at in placed(_intervals(phases, scale), width):
        axes.annotate(
            label.text,
            xy=(label.preferred / width, 1),
            xycoords="axes fraction",
            xytext=(at / width, 1 + 0.13 / PANEL),
            textcoords="axes fraction",
            fontsize=SMALL,
            color=INK,
            ha="center",
            va="bottom",
            arrowprops=_leader(FAINT, from_=(0.5, 0)),
        )


def _intervals(phases: list[PhaseSpan], scale: Scale) -> Iterator[Interval]:
    """Phases that are long enough to be visible; consecutive trials share a label."""
    for timed, group in groupby(phases, key=lambda span: span.phase in SHADES):
        for spans in [list(group)] if timed else [[span] for span in group]:
            interval = scale.interval(_group_name(spans), spans[0].start_s, spans[-1].end_s)
            if interval.length > SHORTEST_LABELED:
                yield interval


def _group_name(spans: list[PhaseSpan]) -> str:
    trials = sum(span.phase == "prefill" for span in spans)
    text = ", ".join(dict.fromkeys(span.phase for span in spans))
    return f"{text} ×{trials}" if trials > 1 else text


def _label_cells(axes: "Axes", timeline: Timeline, scale: Scale) -> None:
    """In the strip below zero, with a bar for each."""
    width = WIDTH - LEFT - RIGHT
    intervals = []
    for cell in timeline.cells:
        text = f"{cell.name}, failed" if cell.failed else cell.name
        intervals.append(scale.interval(text, cell.start_s, cell.end_s))
        ends = [intervals[-1].start / width, intervals[-1].end / width]
        axes.plot(ends, [0.15 * LANE / PANEL] * 2, color=INK, linewidth=2, transform=axes.transAxes,
                  solid_capstyle="butt", marker="|", markersize=5)  # fmt: skip
    for label, at in placed(intervals, width):
        axes.text(at / width, 0.6 * LANE / PANEL, label.text, transform=axes.transAxes, fontsize=SMALL,
                  color=INK, ha="center", va="center")  # fmt: skip


def _leader(color: str, from_: tuple[float, float]) -> dict[str, object]:
    """The line from a label to its target; `from_` is where it starts, as shares of the text's size."""
    return {
        "arrowstyle": "-",
        "color": color,
        "linewidth": 0.5,
        "relpos": from_,
        "shrinkA": 1,
        "shrinkB": 0,
    }
