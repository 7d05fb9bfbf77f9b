"""`qbench-memory RUN`: what torch says of memory and what NVML says, phase by phase."""

from pathlib import Path

import click
import msgspec

from orchestrator.command_line import run_command
from orchestrator.errors import BadInput
from orchestrator.memory import PhaseMemory, phase_memory
from orchestrator.report.memory_table import print_memory
from orchestrator.store import read_run
from orchestrator.warnings import run_warnings
from orchestrator.workloads import full_name


def main() -> None:
    """Entry point of the console script."""
    run_command(show_memory)


class MemoryLedger(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` prints, all in bytes: a cell's name → its phases in order."""

    phases: dict[str, list[PhaseMemory]]
    notes: list[str]


@click.command("qbench-memory")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--precision", "-p", multiple=True, help="Show this precision only; repeatable.")
@click.option("--json", "json_", is_flag=True, help="Print bytes as JSON.")
def show_memory(run: Path, precision: tuple[str, ...], json_: bool) -> int:
    """Compare torch's memory figures with NVML's for the run folder RUN, phase by phase."""
    measured = read_run(run)
    cells = [cell for cell in measured.cells if cell.edges and (not precision or cell.precision in precision)]
    unknown = set(precision) - {cell.precision for cell in cells}
    if unknown or not cells:
        has = ", ".join(cell.precision for cell in measured.cells if cell.edges) or "none"
        raise BadInput(
            "--precision", ", ".join(sorted(unknown)), "has no memory figures in this run", f"It has {has}"
        )
    if json_:
        ledger = MemoryLedger(
            phases={full_name(cell, measured.cells): phase_memory(cell) for cell in cells},
            notes=run_warnings(measured),
        )
        click.echo(msgspec.json.format(msgspec.json.encode(ledger)).decode())
    else:
        print_memory(measured, cells)
    return 0
