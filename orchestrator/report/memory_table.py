"""Torch's memory and NVML's side by side, one table per precision."""

import click
from rich.box import SIMPLE_HEAD
from rich.table import Table

from orchestrator.analysis.memory.peak_gap import gap_sentence, peak_gap
from orchestrator.analysis.memory.phases import on_gpu, phase_memory
from orchestrator.records.names import full_name
from orchestrator.report.console import open_console
from orchestrator.report.warnings import run_warnings
from orchestrator.units import ABSENT, mib
from schemas.record import CellRecord, Run

GPU_HEADINGS = (
    ("torch allocated", "allocated_bytes"),
    ("torch reserved", "reserved_bytes"),
    ("torch peak", "peak_allocated_bytes"),
    ("NVML process", "process_bytes"),
    ("outside torch", "outside_torch_bytes"),
    ("NVML device", "device_bytes"),
    ("device peak seen", "sampled_peak_bytes"),
)
CPU_HEADINGS = (("resident set", "process_bytes"), ("peak seen", "sampled_peak_bytes"))


def print_memory(run: Run, cells: list[CellRecord]) -> None:
    """One table per cell, in MiB: each phase as it ended, and its peaks."""
    console = open_console()
    for cell in cells:
        headings = GPU_HEADINGS if on_gpu(cell) else CPU_HEADINGS
        click.echo(f"{full_name(cell, run.cells)}: {cell.label}, MiB at the end of each phase")
        table = Table(box=SIMPLE_HEAD)
        table.add_column("phase")
        for heading, _ in headings:
            table.add_column(heading, justify="right")
        table.add_column("seen at s", justify="right")
        start_ns = cell.edges[0].phase.at_ns
        for phase in phase_memory(cell):
            at_ns = phase.sampled_peak_at_ns
            at_s = ABSENT if at_ns is None else f"{(at_ns - start_ns) / 1e9:.1f}"
            table.add_row(phase.phase, *(mib(getattr(phase, field)) for _, field in headings), at_s)
        console.print(table)
        if on_gpu(cell):
            click.echo(f"device in use before the worker: {mib(cell.baseline_device_bytes)} MiB")
        gap = peak_gap(cell)
        if gap and cell.sampler:
            click.echo(gap_sentence(gap, cell.sampler.period_s))
        click.echo()
    for line in run_warnings(run):
        click.echo(f"• {line}")
