"""`qbench-memory RUN`: each worker's memory, accounted for to the last byte and phase by phase."""

from contextlib import ExitStack
from pathlib import Path
from typing import get_args

import click
import msgspec

from orchestrator.analysis.memory.by_purpose import MemoryByPurpose
from orchestrator.analysis.memory.cell_memory import CellMemory, cell_memories
from orchestrator.analysis.memory.ledger import Ledger
from orchestrator.analysis.memory.phases import PhaseMemory
from orchestrator.analysis.memory.timeline import timelines
from orchestrator.analysis.rounds import typical_run
from orchestrator.cli.orchestrate import open_nvml
from orchestrator.cli.program import qbench_command, run_command
from orchestrator.errors import BadInput
from orchestrator.hardware.live import watch
from orchestrator.records.store import read_run
from orchestrator.report.ledger_table import print_ledgers
from orchestrator.report.live_lines import print_live
from orchestrator.report.memory_table import print_memory
from orchestrator.report.plot import REQUIREMENT, formats, title
from orchestrator.report.purpose_table import print_by_purpose
from orchestrator.report.warnings import run_warnings
from schemas.frames import PhaseName
from schemas.record import CellRecord, Run


def main() -> None:
    """Entry point of the console script."""
    run_command(show_memory)


class MemoryLedger(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` prints, all in bytes: cell name → its phases in order, and its ledger at each."""

    phases: dict[str, list[PhaseMemory]]
    ledgers: dict[str, dict[PhaseName, Ledger]]
    needs: dict[str, MemoryByPurpose]
    notes: list[str]


@qbench_command("qbench-memory")
@click.argument("run", type=click.Path(path_type=Path), required=False)
@click.option("--precision", "-p", multiple=True, help="Show only this precision; repeatable.")
@click.option(
    "--phase", type=click.Choice(get_args(PhaseName)), default="decode", show_default=True,
    help="Show the ledger at the end of this phase.",
)  # fmt: skip
@click.option("--json", "json_", is_flag=True, help="Print all phases as JSON, in bytes.")
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE.html|png",
    help="Also plot memory over time, in all phases, to this file.",
)  # fmt: skip
@click.option(
    "--live", metavar="PID|COMMAND",
    help="Instead of RUN: watch any program, already running (PID) or started now (COMMAND).",
)  # fmt: skip
def show_memory(
    run: Path | None,
    precision: tuple[str, ...],
    phase: PhaseName,
    json_: bool,
    plot: Path | None,
    live: str | None,
) -> int:
    """Show what each worker in the run folder RUN used memory for, as NVML and torch count it."""
    if live is not None:
        with ExitStack() as stack:
            print_live(watch(live, open_nvml(stack)[0]), json_)
        return 0
    if run is None:
        raise BadInput("RUN", "", "is missing", "Name a run folder, or use --live")
    measured = typical_run(read_run(run))
    memories = cell_memories(measured)
    shown = choose_cells(memories, precision)
    if plot:
        draw(plot, measured, [each.cell for each in shown], run.resolve().name)
        click.echo(f"plotted: {plot}", err=True)
    notes = run_warnings(measured, [each.phases for each in memories])
    if json_:
        print_json(shown, notes)
    else:
        print_tables(shown, notes, phase)
    return 0


def choose_cells(memories: list[CellMemory], precisions: tuple[str, ...]) -> list[CellMemory]:
    """Those with memory figures; of these precisions, if any are named. Raises `BadInput` if one has none."""
    known = [each for each in memories if each.cell.edges]
    shown = [each for each in known if not precisions or each.cell.precision in precisions]
    unknown = set(precisions) - {each.cell.precision for each in shown}
    if unknown or not shown:
        has = ", ".join(dict.fromkeys(each.cell.precision for each in known)) or "none"
        raise BadInput(
            "--precision", ", ".join(sorted(unknown)), "has no memory figures in this run", f"There are {has}"
        )
    return shown


def print_json(shown: list[CellMemory], notes: list[str]) -> None:
    """Print all figures of these cells, in bytes."""
    document = MemoryLedger(
        phases={each.name: each.phases for each in shown},
        ledgers={each.name: each.ledgers for each in shown},
        needs={each.name: each.by_purpose for each in shown if each.by_purpose},
        notes=notes,
    )
    click.echo(msgspec.json.format(msgspec.json.encode(document)).decode())


def print_tables(shown: list[CellMemory], notes: list[str], phase: PhaseName) -> None:
    """Print the ledgers at the end of a phase, memory by purpose, all phases, and the notes."""
    booked = [each for each in shown if phase in each.ledgers]
    if booked:
        print_ledgers({each.name: each.ledgers[phase] for each in booked}, phase)
        click.echo()
        print_by_purpose({each.name: each.by_purpose for each in booked if each.by_purpose})
    print_memory(shown)
    for line in notes:
        click.echo(f"• {line}")


def draw(file: Path, run: Run, cells: list[CellRecord], name: str) -> None:
    """Plot these cells of the run called `name` to a file. Raises `BadInput` if it can't be written."""
    form = formats().get(file.suffix.lower())
    if form is None:
        endings = " or ".join(formats())
        raise BadInput("--plot", str(file), "has no known file extension", f"Use {endings}")
    try:
        file.write_bytes(form(timelines(run, cells), title(run, name)))
    except ModuleNotFoundError as error:
        raise BadInput(
            "--plot", str(file), f"needs {error.name}, which is not installed",
            f"Run: pip install '{REQUIREMENT}'",
        ) from None  # fmt: skip
    except OSError as error:
        raise BadInput(
            "--plot", str(file), f"can't be written: {error.strerror}", "Name another file"
        ) from None  # fmt: skip
