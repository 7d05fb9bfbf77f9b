"""Figures of several cells side by side: a row per quantity, a column per cell."""

from collections.abc import Iterable
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from orchestrator.report.console import open_console
from orchestrator.units import tenths_mib


class Line(NamedTuple):
    """A row: its heading and a figure for each cell, None if unknown."""

    heading: str
    bytes_: list[int | None]


def print_side_by_side(names: Iterable[str], lines: Iterable[Line]) -> None:
    """In MiB; `names` are the names of the cells, in the order of each line's figures."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for line in lines:
        table.add_row(line.heading, *map(tenths_mib, line.bytes_))
    open_console().print(table)
