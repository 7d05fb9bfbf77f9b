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

from orchestrator.analysis.best_mode import Best, best_modes, leads
from orchestrator.analysis.divergence import Divergence, divergences
from orchestrator.analysis.metrics import CellMetrics, reason
from orchestrator.analysis.rounds import round_notes, summarize_rounds, typical_run
from orchestrator.records.names import full_names
from orchestrator.report.best_table import best_table
from orchestrator.report.console import open_console
from orchestrator.report.explain import explanations
from orchestrator.report.proof import proof
from orchestrator.report.warnings import run_warnings
from orchestrator.units import ABSENT, mib, milliseconds, percent, rate, ratio
from schemas.frames import Failed
from schemas.record import PeaksRecord, Run


class Column(NamedTuple):
    """A heading and how its figure is read off a row."""

    heading: str
    show: Callable[[CellMetrics], str]


SPEED = [
    Column("TTFT ms", lambda row: milliseconds(row.ttft_s)),
    Column("decode tok/s", lambda row: rate(row.decode_tok_s)),
    Column("vs FP16", lambda row: _versus_fp16(row)),
    Column("MBU", lambda row: percent(row.decode_mbu)),
]
BOUND = Column("bound", lambda row: row.decode_bound or ABSENT)
END_TO_END = Column("end to end tok/s", lambda row: rate(row.end_to_end_tok_s))
PARENTHESES = "ratios in parentheses compare how fast the host launches kernels, not precisions"
GPU_MEMORY = [
    Column("loaded MiB", lambda row: mib(row.loaded_bytes)),
    Column("peak MiB", lambda row: mib(row.peak_bytes)),
    Column("NVML peak MiB", lambda row: mib(row.nvml_peak_bytes)),
    Column("saved", lambda row: percent(row.saved_versus_baseline)),
]
CPU_MEMORY = [
    Column("weight MiB", lambda row: mib(row.weight_bytes)),
    Column("RSS loaded MiB", lambda row: mib(row.loaded_bytes)),
    Column("RSS peak MiB", lambda row: mib(row.peak_bytes)),
    Column("saved", lambda row: percent(row.saved_versus_baseline)),
]


def columns(run: Run, rows: list[CellMetrics]) -> list[Column]:
    """The columns that fit the device of a run, and what its rows differ in."""
    on_cpu = all(job.device == "cpu" for job in run.plan.jobs)
    shown = [Column("precision", lambda row: row.precision)]
    if {row.decode for row in rows} != {"eager"}:
        shown.append(Column("decode", lambda row: row.decode))
    if len({row.batch_size for row in rows}) > 1:
        shown.append(Column("batch", lambda row: str(row.batch_size)))
    if len({row.prompt_tokens for row in rows}) > 1:
        shown.append(
            Column("prompt", lambda row: ABSENT if row.prompt_tokens is None else f"{row.prompt_tokens:,}")
        )
    if len({row.depth for row in rows}) > 1:
        shown.append(Column("depth", lambda row: f"{row.depth:,}"))
    if len({row.new_tokens for row in rows} - {None}) > 1:
        shown.append(Column("new", lambda row: ABSENT if row.new_tokens is None else f"{row.new_tokens:,}"))
    bound = [BOUND] if any(row.decode_bound for row in rows) else []
    return [*shown, *SPEED, *bound, END_TO_END, *(CPU_MEMORY if on_cpu else GPU_MEMORY)]


def _versus_fp16(row: CellMetrics) -> str:
    shown = ratio(row.decode_versus_baseline)
    if row.decode_versus_low is not None and row.decode_versus_high is not None:
        shown += f" [{row.decode_versus_low:.2f}, {row.decode_versus_high:.2f}]"
    return f"({shown})" if row.decode_bound == "launch" and row.decode_versus_baseline is not None else shown


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
    """What all rows have in common; what they differ in is a column."""
    prompts = {job.workload.prompt_tokens for job in run.plan.jobs}
    depths = {job.workload.depth for job in run.plan.jobs}
    prompt = f" of {prompts.pop()} tokens" if len(prompts) == 1 and None not in prompts else ""
    return prompt + (f" after {depths.pop():,} of context" if len(depths) == 1 and 0 not in depths else "")


def print_summary(run: Run, path: Path, verbose: bool = False) -> None:
    """Print the table, why its figures are as they are, what to beware of, and where the raw facts lie."""
    console = open_console()
    rows = summarize_rounds(run)
    table = Table(
        title=title(run),
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    shown = columns(run, rows)
    for index, column in enumerate(shown):
        table.add_column(column.heading, justify="right" if index else "left", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(column.show(row) for column in shown))
    console.print(table)
    if best := best_table(best_modes(rows)):
        console.print(_plain_table(best))
    for line in notes(run, rows):
        click.echo(f"• {line}")
    if verbose:
        for line in proof(typical_run(run)):
            click.echo(line)
    click.echo(f"\nrun folder: {path}")
    for name in ("records.jsonl", "records.jsonl.gz", "peaks.json", "samples", "logs"):
        if (path / name).exists():
            click.echo(f"  {path / name}")
    click.echo(f"memory by phase: qbench-memory {path}")


def _plain_table(lines: list[list[str]]) -> Table:
    heading, *rows = lines
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, text in enumerate(heading):
        table.add_column(text, justify="right" if index else "left", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    return table


def notes(run: Run, rows: list[CellMetrics]) -> list[str]:
    """Why a row has no figures, why the others are as they are, then the warnings of the run."""
    typical = typical_run(run)
    name = full_names(typical.cells)
    failures = [
        f"{name(cell)}: {reason(cell.outcome)}" for cell in typical.cells if isinstance(cell.outcome, Failed)
    ]
    parentheses = [PARENTHESES] if any(_versus_fp16(row).startswith("(") for row in rows) else []
    return [
        *failures,
        *parentheses,
        *round_notes(run),
        *leads(best_modes(rows)),
        *explanations(typical),
        *run_warnings(typical),
    ]


def as_markdown(run: Run) -> str:
    """The same table and notes, to paste into a text."""
    rows = summarize_rounds(run)
    shown = columns(run, rows)
    table = [[column.heading for column in shown], *([column.show(row) for column in shown] for row in rows)]
    lines = [f"**{title(run)}**", "", *_markdown_table(table)]
    if best := best_table(best_modes(rows)):
        lines += ["", *_markdown_table(best)]
    return "\n".join([*lines, "", *(f"- {line}" for line in notes(run, rows))])


def _markdown_table(lines: list[list[str]]) -> list[str]:
    heading, *rows = ["| " + " | ".join(line) + " |" for line in lines]
    return [heading, "| --- |" + " ---: |" * (len(lines[0]) - 1), *rows]


def as_csv(run: Run) -> str:
    """A line of unformatted figures per precision, under their names in `CellMetrics`."""
    text = io.StringIO()
    table = csv.DictWriter(text, CellMetrics.__struct_fields__, lineterminator="\n")
    table.writeheader()
    table.writerows(msgspec.structs.asdict(row) for row in summarize_rounds(run))
    return text.getvalue()


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` prints: unformatted figures, times in seconds and memory in bytes."""

    title: str
    rows: list[CellMetrics]
    best: list[Best]
    """The fastest decode mode of each precision and workload, against FP16's fastest."""
    notes: list[str]
    divergences: list[Divergence]
    """Where decode modes gave different tokens."""
    peaks: PeaksRecord | None
    qbench: str
    commit: str | None


def as_json(run: Run) -> str:
    """The summary as one JSON document."""
    rows = summarize_rounds(run)
    summary = Summary(
        title=title(run),
        rows=rows,
        best=best_modes(rows),
        notes=notes(run, rows),
        divergences=divergences(typical_run(run).cells),
        peaks=run.peaks,
        qbench=run.environment.qbench,
        commit=run.environment.commit,
    )
    return msgspec.json.format(msgspec.json.encode(summary)).decode()
