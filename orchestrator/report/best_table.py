"""The best decode mode of each precision vs. FP16's: a row per precision, a column per workload."""

from orchestrator.analysis.best_mode import Best
from orchestrator.records.keys import BASELINE
from orchestrator.records.names import workload_labels
from orchestrator.units import ABSENT, rate, ratio

HEADING = "best mode"


def best_table(bests: list[Best]) -> list[list[str]]:
    """The heading and the rows, as text; empty without a choice of modes, or without anything to compare."""
    modes = {best.decode for best in bests}
    precisions = list(dict.fromkeys(best.precision for best in bests))
    keys = list(dict.fromkeys(best.workload for best in bests))
    if len(precisions) < 2 or BASELINE not in precisions or (modes == {"eager"} and len(keys) < 2):
        return []
    labels = [label or "vs FP16's best" for label in workload_labels(keys).values()]
    cells = {(best.precision, best.workload): _show(best) for best in bests}
    rows = [[name, *(cells.get((name, key), ABSENT) for key in keys)] for name in precisions]
    return [[HEADING, *labels], *rows]


def _show(best: Best) -> str:
    """FP16's own speed, and the ratio for the others; in parentheses if the host limited the speed."""
    if best.precision == BASELINE or best.versus_baseline is None:
        return f"{rate(best.decode_tok_s)} tok/s, {best.decode}"
    shown = ratio(best.versus_baseline)
    return f"{f'({shown})' if best.host_bound else shown}, {best.decode}"
