"""Figures of made-up and recorded runs, as the commands compute them."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import unwrap

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
    """A row for each cell, in order."""
    return summarize(analyze_cells(run))


def comparison_of(reference: Run, run: Run) -> RunComparison:
    """`run` over `reference`."""
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


@contextmanager
def counted(*functions: Callable[..., object]) -> Iterator[Counter[str]]:
    """How often each of these is called, by its name, whoever imported it."""
    names = {unwrap(function).__code__: function.__name__ for function in functions}
    counts: Counter[str] = Counter()

    def count(frame: object, event: str, _: object) -> None:
        if event == "call" and (name := names.get(frame.f_code)):  # type: ignore[attr-defined]
            counts[name] += 1

    sys.setprofile(count)
    try:
        yield counts
    finally:
        sys.setprofile(None)
