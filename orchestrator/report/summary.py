"""The summary of a run: one row per precision, and below it what a reader must know to believe it."""

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click
import msgspec
from rich.box import SIMPLE_HEAD
from rich.table import Table

from orchestrator.metrics import CellMetrics, summarize
from orchestrator.report.console import open_console
from orchestrator.units import mib, milliseconds, percent, rate, ratio
from orchestrator.warnings import run_warnings
from schemas.record import Run


class Column(NamedTuple):
    """A heading and how its figure is read off a row."""

    heading: str
    show: Callable[[CellMetrics], str]


SPEED = [
    Column("TTFT ms", lambda row: milliseconds(row.ttft_s)),
    Column("decode tok/s", lambda row: rate(row.decode_tok_s)),
    Column("vs FP16", lambda row: ratio(row.decode_versus_baseline)),
    Column("end to end tok/s", lambda row: rate(row.end_to_end_tok_s)),
]
GPU_MEMORY = [
    Column("loaded MiB", lambda row: mib(row.loaded_bytes)),
    Column("peak MiB", lambda row: mib(row.peak_bytes)),
    Column("NVML peak MiB", lambda row: mib(row.nvml_peak_bytes)),
    Column("saved", lambda row: percent(row.saved_versus_baseline)),
]
CPU_MEMORY = [
    Column("weights MiB", lambda row: mib(row.weight_bytes)),
    Column("RSS loaded MiB", lambda row: mib(row.loaded_bytes)),
    Column("RSS peak MiB", lambda row: mib(row.peak_bytes)),
    Column("saved", lambda row: percent(row.saved_versus_baseline)),
]


def columns(run: Run) -> list[Column]:
    """The columns that fit the device of a run."""
    on_cpu = all(job.device == "cpu" for job in run.plan.jobs)
    return [Column("precision", lambda row: row.precision), *SPEED, *(CPU_MEMORY if on_cpu else GPU_MEMORY)]


def title(run: Run) -> str:
    """Model, device and workload in one line."""
    if not run.plan.jobs:
        return "nothing could run"
    job = run.plan.jobs[0]
    devices = {cell.ready.device_name for cell in run.cells if cell.ready}
    device = run.environment.cpu if devices == {"CPU"} else ", ".join(sorted(devices)) or job.device
    load = job.workload
    prompt = f" of {load.prompt_tokens} tokens" if load.prompt_tokens else ""
    return (
        f"{job.model.name} on {device}: {len(load.prompts)} prompts{prompt} × {load.new_tokens} new tokens, "
        f"batch {load.batch_size}, greedy, {load.warmup} warm-up"
    )


def print_summary(run: Run, path: Path) -> None:
    """Print the table, why some rows are empty, the warnings, and where the raw facts lie."""
    console = open_console()
    rows = summarize(run.cells)
    table = Table(
        title=title(run),
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    shown = columns(run)
    for index, column in enumerate(shown):
        table.add_column(column.heading, justify="right" if index else "left", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(column.show(row) for column in shown))
    console.print(table)
    for line in notes(run, rows):
        click.echo(f"• {line}")
    click.echo(f"\nrun folder: {path}")
    for name in ("records.jsonl", "samples", "logs"):
        click.echo(f"  {path / name}")
    click.echo(f"memory by phase: qbench-memory {path}")


def notes(run: Run, rows: list[CellMetrics]) -> list[str]:
    """Why a row has no figures, then the warnings of the run."""
    failures = [
        f"{row.precision}: {row.reason}"
        for row in rows
        if row.reason and not row.reason.startswith("left out")
    ]
    return [*failures, *run_warnings(run)]


def as_markdown(run: Run) -> str:
    """The same table and notes, to paste into a text."""
    rows, shown = summarize(run.cells), columns(run)
    lines = [
        f"**{title(run)}**",
        "",
        "| " + " | ".join(column.heading for column in shown) + " |",
        "| --- |" + " ---: |" * (len(shown) - 1),
    ]
    lines += ["| " + " | ".join(column.show(row) for column in shown) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"- {line}" for line in notes(run, rows))])


def as_csv(run: Run) -> str:
    """A line of unformatted figures per precision, under their names in `CellMetrics`."""
    text = io.StringIO()
    table = csv.DictWriter(text, CellMetrics.__struct_fields__, lineterminator="\n")
    table.writeheader()
    table.writerows(msgspec.structs.asdict(row) for row in summarize(run.cells))
    return text.getvalue()


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` prints: unformatted figures, times in seconds and memory in bytes."""

    title: str
    rows: list[CellMetrics]
    notes: list[str]
    qbench: str
    commit: str | None


def as_json(run: Run) -> str:
    """The summary as one JSON document."""
    rows = summarize(run.cells)
    summary = Summary(
        title=title(run),
        rows=rows,
        notes=notes(run, rows),
        qbench=run.environment.qbench,
        commit=run.environment.commit,
    )
    return msgspec.json.format(msgspec.json.encode(summary)).decode()
