"""A figure over time, as text: a table for each cell, a row for each run."""

import click
from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.table import Table

from orchestrator.analysis.comparison.compare import QUALITY
from orchestrator.analysis.comparison.history import History, Series
from orchestrator.analysis.intervals import Comparison
from orchestrator.report.compare_table import SHOW, interval, verdict_words
from orchestrator.report.console import open_console
from orchestrator.units import ABSENT

BAR_COLUMNS = 16


def print_history(found: History) -> None:
    """Bars start at zero, so their lengths are proportional to the figures."""
    for series in found.series:
        click.echo(_title(series, found.figure))
        open_console().print(_table(series, found.figure))


def _title(series: Series, figure: str) -> str:
    workload = f" ({series.workload})" if series.workload else ""
    return f"{figure} of {series.precision} {series.decode}{workload}: {series.model} on {series.gpu}"


def _table(series: Series, figure: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("date, UTC", "run", "commit", "torch"):
        table.add_column(heading)
    table.add_column(SHOW[figure][1], justify="right")
    table.add_column("")
    table.add_column("vs previous run")
    largest = 1.0 if figure == QUALITY else max(point.value for point in series.points)
    for point in series.points:
        date = point.started_at[:16].replace("T", " ") if point.started_at else ABSENT
        bar = Bar(largest, 0, point.value, width=BAR_COLUMNS)
        shown = SHOW[figure][0](point.value)
        cells = (date, point.run, point.commit or ABSENT, point.torch or ABSENT, shown)
        table.add_row(*cells, bar, _change(point.change, figure))
    return table


def _change(found: Comparison | None, figure: str) -> str:
    """With a verdict only if there is a difference; otherwise the interval is enough."""
    if found is None:
        return ABSENT
    if found.verdict not in ("faster", "slower"):
        return interval(found)
    return f"{interval(found)} {verdict_words(figure, found.verdict)}"
