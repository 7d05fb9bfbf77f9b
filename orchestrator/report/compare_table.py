"""Comparisons of runs, as text."""

from collections.abc import Iterable, Iterator

import click
from rich.box import SIMPLE_HEAD
from rich.table import Table

from orchestrator.analysis.comparison.compare import EXACT, MEMORY, QUALITY, TOKENS, Pair, RunComparison
from orchestrator.analysis.comparison.gpu_speedups import GpuSpeedups
from orchestrator.analysis.intervals import Comparison
from orchestrator.analysis.verdicts import Verdict
from orchestrator.records.keys import BASELINE
from orchestrator.report.console import open_console
from orchestrator.units import ABSENT, mib, milliseconds, percent, rate, ratio

SHOW = {
    "decode": (rate, "tok/s"),
    "prefill": (rate, "tok/s"),
    "ttft": (milliseconds, "ms"),
    "loaded": (mib, "MiB"),
    "peak": (mib, "MiB"),
    QUALITY: (percent, "as FP16"),
    TOKENS: (percent, "as first run"),
}
"""Figure → how to show it, and its unit."""
_WORDS = {
    "ttft": ("slower", "faster"),
    **dict.fromkeys(MEMORY, ("more", "less")),
    QUALITY: ("closer to FP16", "farther from FP16"),
}
"""Figure → words for a ratio above 1, and below; for other figures `faster` and `slower`."""


def print_comparison(found: RunComparison, names: tuple[str, str]) -> None:
    """A row for each cell and figure, then cells that could not be compared, and other differences."""
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
    """`1.84× [1.81, 1.87]`, or just the ratio if there is no interval."""
    ends = "" if found.low is None or found.high is None else f" [{found.low:.2f}, {found.high:.2f}]"
    return f"{ratio(found.ratio)}{ends}"


def _verdict(pair: Pair) -> str:
    found = pair.comparison
    if found.verdict is not None:
        return verdict_words(pair.figure, found.verdict)
    if pair.figure in EXACT:
        return found.why
    return f"one {'prompt' if pair.figure == QUALITY else 'round'}: no interval"


def verdict_words(figure: str, verdict: Verdict) -> str:
    """The verdict in words that fit the figure: a larger time is slower."""
    more, less = _WORDS.get(figure, ("faster", "slower"))
    return {"faster": more, "slower": less}.get(verdict, verdict)


def print_gpus(rows: list[GpuSpeedups]) -> None:
    """GPU × precision → speed over FP16, each in its best mode."""
    precisions = list(dict.fromkeys(name for row in rows for name in row.best if name != BASELINE))
    differ = any(row.measured for row in rows)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("run", "GPU", *(["measured"] if differ else []), "tensor cores"):
        table.add_column(heading)
    for heading in ("FP16 tok/s", *precisions):
        table.add_column(heading, justify="right")
    for row in rows:
        measured = [row.measured] if differ else []
        table.add_row(row.run, row.gpu, *measured, _tensor_cores(row), *_speeds(row, precisions))
    click.echo(
        "decode speed over FP16, best mode over best mode; in parentheses if the host limited the speed"
    )
    open_console().print(table)


def _tensor_cores(row: GpuSpeedups) -> str:
    """Unknown without a compute capability."""
    return ", ".join(row.tensor_cores) or (ABSENT if row.compute_capability is None else "none")


def _speeds(row: GpuSpeedups, precisions: Iterable[str]) -> Iterator[str]:
    baseline = row.best.get(BASELINE)
    yield rate(baseline.decode_tok_s if baseline else None)
    for name in precisions:
        best = row.best.get(name)
        text = ratio(best.versus_baseline if best else None)
        yield f"({text})" if best and best.host_bound and best.versus_baseline else text
