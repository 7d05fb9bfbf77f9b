"""The summary of a run: a table with a row per cell, and the notes needed to judge it."""

import csv
import io
from pathlib import Path

import click
import msgspec
from rich.box import SIMPLE_HEAD
from rich.table import Table

from orchestrator.analysis.best_mode import Best
from orchestrator.analysis.divergence import Divergence
from orchestrator.analysis.metrics import CellMetrics
from orchestrator.analysis.run_analysis import RunAnalysis, analyze_run
from orchestrator.report.best_table import best_table
from orchestrator.report.columns import columns
from orchestrator.report.console import open_console
from orchestrator.report.details import details
from orchestrator.report.notes import notes
from schemas.record import PeaksRecord, Run

RUN_FILES = ("records.jsonl", "records.jsonl.gz", "peaks.json", "samples", "logs")


def title(run: Run) -> str:
    """Model, device and workload in one line."""
    if not run.plan.jobs:
        return "nothing could run"
    job = run.plan.jobs[0]
    devices = {cell.ready.device_name for cell in run.cells if cell.ready}
    device = run.environment.cpu if devices == {"CPU"} else ", ".join(sorted(devices)) or job.device
    load = job.workload
    batches = {job.workload.batch_size for job in run.plan.jobs}
    batch = f"batch {batches.pop()}" if len(batches) == 1 else "several batch sizes"
    counts = sorted({job.workload.new_tokens for job in run.plan.jobs})
    new = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    return (
        f"{job.model.name} on {device}: {len(load.prompts)} prompts{_lengths(run)} × "
        f"{new} new tokens, {batch}, greedy"
    )


def _lengths(run: Run) -> str:
    """Lengths that all rows share; those that differ between rows have a column."""
    prompts = {job.workload.prompt_tokens for job in run.plan.jobs}
    depths = {job.workload.depth for job in run.plan.jobs}
    prompt = f" of {prompts.pop()} tokens" if len(prompts) == 1 and None not in prompts else ""
    return prompt + (f" after {depths.pop():,} of context" if len(depths) == 1 and 0 not in depths else "")


def print_summary(run: Run, path: Path, verbose: bool = False) -> None:
    """Print the table, explanations of its figures, warnings, and the paths of the records."""
    analysis = analyze_run(run)
    console = open_console()
    console.print(_table(_cells_of_table(analysis), title(run)))
    if best := best_table(analysis.bests):
        console.print(_table(best))
    for line in notes(analysis):
        click.echo(f"• {line}")
    if verbose:
        for line in details(run.peaks, analysis.cells):
            click.echo(line)
    click.echo(f"\nrun folder: {path}")
    for name in RUN_FILES:
        if (path / name).exists():
            click.echo(f"  {path / name}")
    click.echo(f"memory by phase: qbench-memory {path}")


def _cells_of_table(analysis: RunAnalysis) -> list[list[str]]:
    """The heading and the rows, as text."""
    shown = columns(analysis.run, analysis.rows)
    return [
        [column.heading for column in shown],
        *([column.show(row) for column in shown] for row in analysis.rows),
    ]


def _table(lines: list[list[str]], title: str | None = None) -> Table:
    heading, *rows = lines
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for index, text in enumerate(heading):
        table.add_column(text, justify="right" if index else "left", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    return table


def as_markdown(run: Run) -> str:
    """The same table and notes, to paste into a document."""
    analysis = analyze_run(run)
    lines = [f"**{title(run)}**", "", *_markdown_table(_cells_of_table(analysis))]
    if best := best_table(analysis.bests):
        lines += ["", *_markdown_table(best)]
    return "\n".join([*lines, "", *(f"- {line}" for line in notes(analysis))])


def _markdown_table(lines: list[list[str]]) -> list[str]:
    heading, *rows = ["| " + " | ".join(line) + " |" for line in lines]
    return [heading, "| --- |" + " ---: |" * (len(lines[0]) - 1), *rows]


def as_csv(run: Run) -> str:
    """A line of unformatted figures per row, under their names in `CellMetrics`."""
    text = io.StringIO()
    table = csv.DictWriter(text, CellMetrics.__struct_fields__, lineterminator="\n")
    table.writeheader()
    table.writerows(msgspec.structs.asdict(row) for row in analyze_run(run).rows)
    return text.getvalue()


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The output of `--json`: unformatted figures, times in seconds and memory in bytes."""

    title: str
    rows: list[CellMetrics]
    best: list[Best]
    """The fastest decode mode of each precision and workload, compared with FP16's fastest."""
    notes: list[str]
    divergences: list[Divergence]
    """Where decode modes gave different tokens."""
    peaks: PeaksRecord | None
    qbench: str
    commit: str | None


def as_json(run: Run) -> str:
    """The summary as one JSON document."""
    analysis = analyze_run(run)
    summary = Summary(
        title=title(run),
        rows=analysis.rows,
        best=analysis.bests,
        notes=notes(analysis),
        divergences=[each for found in analysis.divergences.values() for each in found],
        peaks=run.peaks,
        qbench=run.environment.qbench,
        commit=run.environment.commit,
    )
    return msgspec.json.format(msgspec.json.encode(summary)).decode()
