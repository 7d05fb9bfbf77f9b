"""All figures of a run's summary, each computed once; tables, notes and explanations only read them."""

from typing import NamedTuple

from orchestrator.analysis.best_mode import Best, best_modes
from orchestrator.analysis.divergence import Divergence, divergences
from orchestrator.analysis.intervals import Comparison
from orchestrator.analysis.metrics import CellAnalysis, CellMetrics, analyze_cells, summarize
from orchestrator.analysis.rounds import comparisons, noise_floor, rows_with_intervals, typical_run
from orchestrator.records.keys import CellKey, WorkloadKey
from schemas.record import Run


class RunAnalysis(NamedTuple):
    """A run and its figures. `cells` and `rows` are in the order of the typical run's cells."""

    run: Run
    """All rounds."""
    typical: Run
    """One cell for each row."""
    cells: list[CellAnalysis]
    rows: list[CellMetrics]
    comparisons: dict[CellKey, Comparison]
    """Decode speed over FP16's, over all rounds."""
    noise_floor: float
    """How far FP16 differed from itself."""
    bests: list[Best]
    divergences: dict[WorkloadKey, list[Divergence]]


def analyze_run(run: Run) -> RunAnalysis:
    """Every figure of a run."""
    typical = typical_run(run)
    cells = analyze_cells(typical)
    floor = noise_floor(run)
    found = comparisons(run, floor)
    rows = rows_with_intervals(run, typical, summarize(cells), found)
    return RunAnalysis(
        run=run,
        typical=typical,
        cells=cells,
        rows=rows,
        comparisons=found,
        noise_floor=floor,
        bests=best_modes(rows),
        divergences=divergences(typical.cells),
    )
