"""`qbench-memory RUN`: NVML's figure for each worker taken apart to the last byte, and phase by phase."""

from pathlib import Path
from typing import get_args

import click
import msgspec

from orchestrator.command_line import run_command
from orchestrator.errors import BadInput
from orchestrator.ledger import Ledger, ledgers
from orchestrator.memory import PhaseMemory, phase_memory
from orchestrator.needs import Needs, needs
from orchestrator.report.ledger_table import print_ledgers
from orchestrator.report.memory_table import print_memory
from orchestrator.report.needs_table import print_needs
from orchestrator.store import read_run
from orchestrator.warnings import run_warnings
from orchestrator.workloads import full_name
from schemas.frames import PhaseName


def main() -> None:
    """Entry point of the console script."""
    run_command(show_memory)


class MemoryLedger(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` prints, all in bytes: a cell's name → its phases in order, and its ledger at each."""

    phases: dict[str, list[PhaseMemory]]
    ledgers: dict[str, dict[PhaseName, Ledger]]
    needs: dict[str, Needs]
    notes: list[str]


@click.command("qbench-memory")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--precision", "-p", multiple=True, help="Show this precision only; repeatable.")
@click.option(
    "--phase", type=click.Choice(get_args(PhaseName)), default="decode", show_default=True,
    help="At the end of which phase to draw up the ledger.",
)  # fmt: skip
@click.option("--json", "json_", is_flag=True, help="Print bytes as JSON, of all phases.")
def show_memory(run: Path, precision: tuple[str, ...], phase: PhaseName, json_: bool) -> int:
    """Take NVML's figure for each worker of the run folder RUN apart, and follow both views over phases."""
    measured = read_run(run)
    cells = [cell for cell in measured.cells if cell.edges and (not precision or cell.precision in precision)]
    unknown = set(precision) - {cell.precision for cell in cells}
    if unknown or not cells:
        has = ", ".join(dict.fromkeys(cell.precision for cell in measured.cells if cell.edges)) or "none"
        raise BadInput(
            "--precision", ", ".join(sorted(unknown)), "has no memory figures in this run", f"It has {has}"
        )
    named = {full_name(cell, measured.cells): cell for cell in cells}
    books = {name: ledgers(cell) for name, cell in named.items()}
    purposes = {name: need for name, cell in named.items() if (need := needs(cell))}
    if json_:
        phases = {name: phase_memory(cell) for name, cell in named.items()}
        told = MemoryLedger(phases=phases, ledgers=books, needs=purposes, notes=run_warnings(measured))
        click.echo(msgspec.json.format(msgspec.json.encode(told)).decode())
        return 0
    at_phase = {name: book[phase] for name, book in books.items() if phase in book}
    if at_phase:
        print_ledgers(at_phase, phase)
        click.echo()
        print_needs({name: purposes[name] for name in at_phase if name in purposes})
    print_memory(measured, cells)
    return 0
