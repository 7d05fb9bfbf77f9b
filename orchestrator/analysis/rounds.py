"""One table from the rounds of a run: one row per cell, ratios with intervals, and verdicts.

A row shows one of the rounds unchanged, the one with the median decode speed; a mean over rounds would be a
cell that nobody measured. Its ratio to FP16 is taken over all rounds.
"""

from collections.abc import Iterator

import msgspec

from orchestrator.analysis.baselines import baseline_of, find_baselines
from orchestrator.analysis.intervals import Comparison, compare_all, of_ratios
from orchestrator.analysis.metrics import CellMetrics, decode_tok_s
from orchestrator.records.keys import BASELINE, CellKey, key_of
from orchestrator.records.names import cell_namer
from orchestrator.units import ratio
from schemas.frames import Done
from schemas.record import CellRecord, Run


def rounds_of(run: Run) -> int:
    """The number of rounds that have started."""
    return 1 + max((key_of(cell).round for cell in run.cells), default=0)


def typical_run(run: Run) -> Run:
    """The run with one cell for each row, the one with the median decode speed.

    A row shows a failed cell only if the cell failed in every round.
    """
    return msgspec.structs.replace(run, cells=[_typical(cells) for cells in _cells_of_rows(run).values()])


def _cells_of_rows(run: Run) -> dict[CellKey, list[CellRecord]]:
    """The cells of all rounds by row, without A/A controls, in the order of the table."""
    rows: dict[CellKey, list[CellRecord]] = {}
    for cell in run.cells:
        if not key_of(cell).aa_control:
            rows.setdefault(key_of(cell).without_round, []).append(cell)
    if rounds_of(run) > 1:  # the order within a round was shuffled
        rows = dict(sorted(rows.items(), key=lambda row: _rank(row[1][0], run)))
    return rows


def rows_with_intervals(
    run: Run, typical: Run, rows: list[CellMetrics], found: dict[CellKey, Comparison]
) -> list[CellMetrics]:
    """The rows of the typical run's cells, with the ratio to FP16 taken over all rounds."""
    if rounds_of(run) == 1:
        return rows
    return [
        _with_comparison(row, found[key]) if (key := key_of(cell).without_round) in found else row
        for cell, row in zip(typical.cells, rows, strict=True)
    ]


def _with_comparison(row: CellMetrics, found: Comparison) -> CellMetrics:
    return msgspec.structs.replace(
        row,
        rounds=found.rounds,
        decode_versus_baseline=found.ratio,
        decode_versus_low=found.low,
        decode_versus_high=found.high,
        verdict=found.verdict,
    )


def comparisons(run: Run, floor: float) -> dict[CellKey, Comparison]:
    """Row → its decode speed over FP16's in the same mode, taken round by round; without FP16 itself.

    `floor` is the noise floor, below which there is no verdict.
    """
    ratios = _ratios(run, [cell for cell in run.cells if cell.precision != BASELINE])
    found = compare_all([of_ratios(each, floor) for each in ratios.values()])
    return dict(zip(ratios, found, strict=True))


def noise_floor(run: Run) -> float:
    """The largest difference between FP16 and itself, over all workloads and modes; 0 without `--aa`."""
    found = _ratios(run, [cell for cell in run.cells if key_of(cell).aa_control]).values()
    return max((abs(of_ratios(each).ratio - 1) for each in found), default=0.0)


def round_notes(run: Run, found: dict[CellKey, Comparison], floor: float) -> Iterator[str]:
    """Notes on rounds: their number, the noise floor, verdicts, and rounds that failed."""
    if rounds_of(run) == 1:
        if found:
            yield "one round: the ratios have no interval (--rounds 7 adds one)"
        return
    if any(key_of(cell).aa_control for cell in run.cells):
        yield f"FP16 differed from itself by {floor:.1%}: smaller differences get no verdict"
    rows, name = _cells_of_rows(run), cell_namer(run.cells)
    for key, each in found.items():
        yield f"{name(rows[key][0])}: {each.verdict or 'one round'}, {each.why or ratio(each.ratio)}"
    for cells in rows.values():
        measured = sum(isinstance(cell.outcome, Done) for cell in cells)
        if 0 < measured < len(cells):
            yield f"{name(cells[0])}: measured in {measured} of {len(cells)} rounds"


def is_precise(run: Run, half_width: float) -> bool:
    """Whether half of every ratio's interval, relative to the ratio, is at most `half_width`."""
    widths = [each.half_width for each in comparisons(run, noise_floor(run)).values()]
    return bool(widths) and all(width is not None and width <= half_width for width in widths)


def _rank(cell: CellRecord, run: Run) -> tuple[float, str]:
    """In the order of `--precision`, otherwise from many bits to few."""
    named = run.plan.options.precision
    return (named.index(cell.precision) if cell.precision in named else -cell.bits_per_weight), cell.precision


def _typical(cells: list[CellRecord]) -> CellRecord:
    measured = [cell for cell in cells if isinstance(cell.outcome, Done)]
    if not measured:
        return cells[0]
    by_speed = sorted(measured, key=lambda cell: decode_tok_s(cell) or 0.0)
    return by_speed[(len(by_speed) - 1) // 2]


def _ratios(run: Run, cells: list[CellRecord]) -> dict[CellKey, list[float]]:
    """Row → decode speed over FP16's of the same round, for each round with both."""
    rounds: dict[int, list[CellRecord]] = {}
    for cell in run.cells:
        rounds.setdefault(key_of(cell).round, []).append(cell)
    baselines = {round_: find_baselines(alike) for round_, alike in rounds.items()}
    found: dict[CellKey, list[float]] = {}
    for cell in cells:
        baseline = baseline_of(cell, baselines[key_of(cell).round])
        if baseline is None or baseline is cell:
            continue
        speed, reference = decode_tok_s(cell), decode_tok_s(baseline)
        if speed and reference:
            found.setdefault(key_of(cell).without_round, []).append(speed / reference)
    return found
