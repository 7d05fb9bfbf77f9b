"""The notes below the table of a run: failures, verdicts, explanations and warnings, a line each."""

from orchestrator.analysis.best_mode import leads
from orchestrator.analysis.metrics import reason
from orchestrator.analysis.rounds import round_notes
from orchestrator.analysis.run_analysis import RunAnalysis
from orchestrator.records.names import cell_namer
from orchestrator.report.columns import versus_fp16
from orchestrator.report.explain import explanations
from orchestrator.report.warnings import run_warnings
from schemas.frames import Failed

PARENTHESES = "ratios in parentheses compare how fast the host launches kernels, not precisions"


def notes(analysis: RunAnalysis) -> list[str]:
    """Why some rows have no figures, explanations of the others, then the warnings of the run."""
    cells = analysis.typical.cells
    name = cell_namer(cells)
    failures = [f"{name(cell)}: {reason(cell.outcome)}" for cell in cells if isinstance(cell.outcome, Failed)]
    parentheses = [PARENTHESES] if any(versus_fp16(row).startswith("(") for row in analysis.rows) else []
    return [
        *failures,
        *parentheses,
        *round_notes(analysis.run, analysis.comparisons, analysis.noise_floor),
        *leads(analysis.bests),
        *explanations(analysis),
        *run_warnings(analysis.typical, [each.phases for each in analysis.cells]),
    ]
