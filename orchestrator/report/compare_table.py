"""A comparison of runs as text."""

from collections.abc import Iterable

import click
from rich.box import SIMPLE_HEAD
from rich.table import Table

from orchestrator.compare import MEMORY, Pair, RunComparison
from orchestrator.gpu_speedups import GpuSpeedups
from orchestrator.intervals import Comparison
from orchestrator.report.console import open_console
from orchestrator.units import ABSENT, mib, milliseconds, rate, ratio

SHOW = {
    "decode": (rate, "tok/s"),
    "prefill": (rate, "tok/s"),
    "ttft": (milliseconds, "ms"),
    "loaded": (mib, "MiB"),
    "peak": (mib, "MiB"),
}
"""Figure → how it is shown, and its unit."""


def print_comparison(found: RunComparison, names: tuple[str, str]) -> None:
    """A row for each cell and figure, then what could not be compared, and what else differs."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("precision", "decode", "figure"):
        table.add_column(heading)
    for heading in (*names, "ratio"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for pair in found.pairs:
        table.add_row(*_row(pair))
    if found.pairs:
        open_console().print(table)
    for line in (*found.unmatched, *found.differences):
        click.echo(f"• {line}")


def _row(pair: Pair) -> list[str]:
    show, unit = SHOW[pair.figure]
    cell = f"{pair.decode} ({pair.workload})" if pair.workload else pair.decode
    figures = [show(pair.reference), show(pair.value), interval(pair.comparison)]
    return [pair.precision, cell, f"{pair.figure}, {unit}", *figures, _verdict(pair)]


def interval(found: Comparison) -> str:
    """`1.84× [1.81, 1.87]`, or the ratio alone where there is no interval."""
    ends = "" if found.low is None or found.high is None else f" [{found.low:.2f}, {found.high:.2f}]"
    return f"{ratio(found.ratio)}{ends}"


def _verdict(pair: Pair) -> str:
    """In words that fit the figure: a longer time is no faster one."""
    verdict = pair.comparison.verdict
    if verdict is None:
        return "" if pair.figure in MEMORY else "one round: no interval"
    if verdict in ("same", "can't tell"):
        return verdict
    more = verdict == "faster"
    if pair.figure in MEMORY:
        return "more" if more else "less"
    if pair.figure == "ttft":
        return "slower" if more else "faster"
    return verdict


def print_gpus(rows: list[GpuSpeedups]) -> None:
    """GPU × precision → speed over FP16, each in its best mode."""
    precisions = list(dict.fromkeys(name for row in rows for name in row.best))
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("GPU", "tensor cores"):
        table.add_column(heading)
    for name in precisions:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row.gpu, ", ".join(row.tensor_cores) or ABSENT, *_speedups(row, precisions))
    click.echo("decode speed over FP16, best mode over best mode; in parentheses where a host set the pace")
    open_console().print(table)


def _speedups(row: GpuSpeedups, precisions: Iterable[str]) -> list[str]:
    shown = []
    for name in precisions:
        best = row.best.get(name)
        text = ratio(best.versus_baseline if best else None)
        shown.append(f"({text})" if best and best.host_bound and best.versus_baseline else text)
    return shown
