"""Figures of runs and cells, computed the way the commands do."""

from sample_records import make_run

from orchestrator.analysis.comparison.compare import RunComparison, compare_runs
from orchestrator.analysis.comparison.measured_run import measure_run
from orchestrator.analysis.memory.by_purpose import MemoryByPurpose
from orchestrator.analysis.memory.cell_memory import CellMemory, cell_memories
from orchestrator.analysis.memory.phases import MemorySummary, phase_memory, summarize_memory
from orchestrator.analysis.metrics import CellMetrics, analyze_cells, summarize
from orchestrator.report.warnings import run_warnings
from schemas.record import CellRecord, Run


def rows_of(run: Run) -> list[CellMetrics]:
    """The rows of the table."""
    return summarize(analyze_cells(run))


def comparison_of(reference: Run, run: Run) -> RunComparison:
    """Ratios of `run` to `reference`."""
    return compare_runs(measure_run(reference), measure_run(run))


def warnings_of(run: Run) -> list[str]:
    return run_warnings(run, [phase_memory(cell) for cell in run.cells])


def cell_memory_of(cell: CellRecord) -> CellMemory:
    (found,) = cell_memories(make_run(cell))
    return found


def by_purpose_of(cell: CellRecord) -> MemoryByPurpose | None:
    return cell_memory_of(cell).by_purpose


def memory_of(cell: CellRecord) -> MemorySummary:
    return summarize_memory(cell, phase_memory(cell))
