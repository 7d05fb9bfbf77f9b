"""Which FP16 cell each cell is compared with: the one with the same workload and decode mode."""

from collections.abc import Iterable

from orchestrator.records.keys import CellKey, key_of
from schemas.frames import Done
from schemas.record import CellRecord

Baselines = dict[CellKey, CellRecord]


def find_baselines(cells: Iterable[CellRecord]) -> Baselines:
    """The measured FP16 cells among these, by key without the round; the first one of several rounds."""
    found: Baselines = {}
    for cell in cells:
        key = key_of(cell)
        if key.is_baseline and isinstance(cell.outcome, Done):
            found.setdefault(key.without_round, cell)
    return found


def baseline_of(cell: CellRecord, baselines: Baselines) -> CellRecord | None:
    """The measured FP16 cell that this one is compared with; an FP16 cell is its own."""
    key = key_of(cell)
    if key.is_baseline:
        return cell if isinstance(cell.outcome, Done) else None
    return baselines.get(key.baseline.without_round)
