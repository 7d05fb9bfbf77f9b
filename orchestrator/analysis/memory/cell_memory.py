"""All memory figures of a cell, each computed once."""

from typing import NamedTuple

from orchestrator.analysis.memory.by_purpose import MemoryByPurpose, memory_by_purpose
from orchestrator.analysis.memory.ledger import Ledger, ledgers
from orchestrator.analysis.memory.peak_gap import PeakGap, peak_gap
from orchestrator.analysis.memory.phases import PhaseMemory, phase_memory, summarize_memory
from orchestrator.records.names import cell_namer
from schemas.frames import PhaseName
from schemas.record import CellRecord, Run


class CellMemory(NamedTuple):
    """A cell and its memory figures, for tables, JSON and warnings."""

    name: str
    cell: CellRecord
    phases: list[PhaseMemory]
    ledgers: dict[PhaseName, Ledger]
    by_purpose: MemoryByPurpose | None
    gap: PeakGap | None


def cell_memories(run: Run) -> list[CellMemory]:
    """One for each cell of the run, in order."""
    name = cell_namer(run.cells)
    return [_cell_memory(cell, name(cell)) for cell in run.cells]


def _cell_memory(cell: CellRecord, name: str) -> CellMemory:
    phases, books = phase_memory(cell), ledgers(cell)
    return CellMemory(
        name=name,
        cell=cell,
        phases=phases,
        ledgers=books,
        by_purpose=memory_by_purpose(cell, summarize_memory(cell, phases), books),
        gap=peak_gap(cell, phases),
    )
