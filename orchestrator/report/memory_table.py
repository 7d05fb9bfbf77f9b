"""Torch's memory and NVML's side by side, one table per cell."""

import click
from rich.box import SIMPLE_HEAD
from rich.table import Table

from orchestrator.analysis.memory.cell_memory import CellMemory
from orchestrator.analysis.memory.peak_gap import gap_sentence
from orchestrator.analysis.memory.phases import on_gpu
from orchestrator.report.console import open_console
from orchestrator.units import ABSENT, mib

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


def print_memory(cells: list[CellMemory]) -> None:
    """One table per cell, in MiB: each phase at its end, and its peaks."""
    for memory in cells:
        cell = memory.cell
        click.echo(f"{memory.name}: {cell.label}, MiB at the end of each phase")
        open_console().print(_table(memory))
        if on_gpu(cell):
            click.echo(f"device memory in use before the worker: {mib(cell.baseline_device_bytes)} MiB")
        if memory.gap and cell.sampler:
            click.echo(gap_sentence(memory.gap, cell.sampler.period_s))
        click.echo()


def _table(memory: CellMemory) -> Table:
    headings = GPU_HEADINGS if on_gpu(memory.cell) else CPU_HEADINGS
    table = Table(box=SIMPLE_HEAD)
    table.add_column("phase")
    for heading, _ in headings:
        table.add_column(heading, justify="right")
    table.add_column("seen at s", justify="right")
    for phase in memory.phases:
        at_ns = phase.sampled_peak_at_ns
        at_s = ABSENT if at_ns is None else f"{(at_ns - memory.cell.edges[0].phase.at_ns) / 1e9:.1f}"
        table.add_row(phase.phase, *(mib(getattr(phase, field)) for _, field in headings), at_s)
    return table
