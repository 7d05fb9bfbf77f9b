"""Two runs held against each other: what both measured, by how much it differs, and what can't be compared.

Cells are matched by what was measured: precision, decode mode, model, prompts and workload. Where one has no
counterpart it is said which of these differ. Torch, GPU and commit may differ, since that is often the
question; they are told.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from operator import attrgetter
from typing import NamedTuple

import msgspec

from orchestrator.errors import BadInput
from orchestrator.intervals import Comparison, compare_unpaired
from orchestrator.metrics import CellMetrics, measure_cell, reason
from orchestrator.workloads import is_twin
from schemas.frames import Done
from schemas.job import DecodeMode
from schemas.record import CellRecord, Run

FIGURES = {
    "decode": "decode_tok_s",
    "ttft": "ttft_s",
    "prefill": "prefill_tok_s",
    "loaded": "footprint_bytes",
    "peak": "peak_bytes",
}
"""What is compared → its field in `CellMetrics`."""
MEMORY = {"loaded", "peak"}
"""Figures that don't vary from one process to the next: one round tells all of them."""
_LIMIT = re.compile(rf"(?P<figure>{'|'.join(FIGURES)})(?P<sign>[<>])(?P<limit>\d*\.?\d+)")


class Measured(NamedTuple):
    """What was measured: cells are compared where all of it is the same. Field names are words for people."""

    precision: str
    decode_mode: DecodeMode
    model: str
    outliers: int
    prompts: str
    prompt_tokens: int | None
    depth: int
    batch_size: int
    new_tokens: int


FREE = Measured._fields[2:]
"""What may differ between cells of one name."""


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of a cell that both runs have: the second run's over the first's."""

    precision: str
    decode: DecodeMode
    workload: str
    """What tells it from others of the same precision and mode; empty where nothing does."""
    figure: str
    reference: float
    value: float
    comparison: Comparison


class RunComparison(msgspec.Struct, frozen=True, kw_only=True):
    """All that there is to say of two runs."""

    pairs: list[Pair]
    unmatched: list[str]
    """Why a cell has no counterpart, a line each."""
    differences: list[str]
    """What differs between the machines and the programs, a line each."""


@dataclass(frozen=True)
class Limit:
    """`decode<0.95`: fail where the second run's decode is under 0.95 of the first's, beyond the noise."""

    figure: str
    below: bool
    limit: float
    text: str

    def is_broken(self, pair: Pair) -> bool:
        """Whether the whole interval lies beyond the limit; memory has none and needs none."""
        if pair.figure != self.figure:
            return False
        found = pair.comparison
        ends = (found.low, found.high) if found.low is not None else (found.ratio, found.ratio)
        if found.low is None and self.figure not in MEMORY:
            return False
        return all(end is not None and (end < self.limit if self.below else end > self.limit) for end in ends)

    def is_open(self, pair: Pair) -> bool:
        """Whether one round can't tell if it is broken, though it looks so."""
        found = pair.comparison
        beyond = found.ratio < self.limit if self.below else found.ratio > self.limit
        return pair.figure == self.figure and beyond and found.low is None and self.figure not in MEMORY


def parse_limit(text: str) -> Limit:
    """Read what stands after `--fail-if`. Raises `BadInput`."""
    match = _LIMIT.fullmatch(text.replace(" ", ""))
    if match is None:
        raise BadInput(
            "--fail-if", text, "is no limit", f"Write e.g. decode<0.95; figures: {', '.join(FIGURES)}"
        )
    return Limit(match["figure"], match["sign"] == "<", float(match["limit"]), text)


def compare_runs(reference: Run, run: Run) -> RunComparison:
    """`run` over `reference`."""
    ours, theirs = _groups(run), _groups(reference)
    shared = [key for key in theirs if key in ours]
    telling = [name for name in FREE if len({getattr(key, name) for key in shared}) > 1]
    return RunComparison(
        pairs=[pair for key in shared for pair in _pairs(key, telling, theirs[key], ours[key])],
        unmatched=list(
            dict.fromkeys([*_unmatched(theirs, ours, "the second"), *_unmatched(ours, theirs, "the first")])
        ),
        differences=list(_differences(reference, run)),
    )


def _groups(run: Run) -> dict[Measured, list[CellRecord]]:
    """The cells of all rounds by what was measured."""
    found: dict[Measured, list[CellRecord]] = {}
    for cell in run.cells:
        if cell.job is not None and not is_twin(cell):
            found.setdefault(_measured(cell), []).append(cell)
    return found


def _measured(cell: CellRecord) -> Measured:
    assert cell.job
    load, model = cell.job.workload, cell.job.model
    digest = hashlib.sha256("\n".join(load.prompts).encode()).hexdigest()[:8]
    # A random model has no texts: its prompts are drawn, and only their number counts.
    prompts = f"{len(load.prompts)} drawn" if model.is_random else digest
    return Measured(
        precision=cell.precision,
        decode_mode=load.decode,
        model=model.name,
        outliers=model.outliers,
        prompts=prompts,
        prompt_tokens=load.prompt_tokens,
        depth=load.depth,
        batch_size=load.batch_size,
        new_tokens=load.new_tokens,
    )


def _pairs(
    key: Measured, telling: list[str], references: list[CellRecord], cells: list[CellRecord]
) -> Iterator[Pair]:
    rows, reference_rows = list(_rows(cells)), list(_rows(references))
    for figure, field in FIGURES.items():
        values, theirs = (
            [value for row in each if (value := getattr(row, field))] for each in (rows, reference_rows)
        )
        if values and theirs:
            found = compare_unpaired(values, theirs)
            yield Pair(
                precision=key.precision,
                decode=key.decode_mode,
                workload=", ".join(f"{name.replace('_', ' ')} {getattr(key, name)}" for name in telling),
                figure=figure,
                reference=sorted(theirs)[(len(theirs) - 1) // 2],
                value=sorted(values)[(len(values) - 1) // 2],
                comparison=found,
            )


def _rows(cells: list[CellRecord]) -> Iterator[CellMetrics]:
    return (measure_cell(cell) for cell in cells if isinstance(cell.outcome, Done))


def _unmatched(
    ours: dict[Measured, list[CellRecord]], theirs: dict[Measured, list[CellRecord]], other: str
) -> Iterator[str]:
    """A line for each of `ours` that the `other` run lacks, or in which one of the two failed."""
    nearest = _nearest([key for key in ours if key not in theirs], list(theirs))
    for key, cells in ours.items():
        name = f"{key.precision} {key.decode_mode}"
        if key not in theirs:
            yield f"{name}: {_why_lacking(key, nearest.get(key), other)}"
        elif not _has_figures(theirs[key]) and _has_figures(cells):
            outcome = theirs[key][0].outcome
            why = "" if isinstance(outcome, Done) else reason(outcome)
            yield f"{name}: has no figures in {other} run: {why}"


def _has_figures(cells: list[CellRecord]) -> bool:
    return any(isinstance(cell.outcome, Done) for cell in cells)


def _nearest(lacking: list[Measured], theirs: list[Measured]) -> dict[Measured, Measured]:
    """For each key that they lack, that of theirs of the same name which differs in the fewest fields.

    It is looked up without one field after the other, then without two: to hold each against each takes
    minutes where there are thousands.
    """
    found: dict[Measured, Measured] = {}
    named = {key[:2] for key in theirs}
    left = [key for key in lacking if key[:2] in named]
    for differing in (names for count in range(len(FREE)) for names in combinations(FREE, count + 1)):
        rest = attrgetter("precision", "decode_mode", *(name for name in FREE if name not in differing))
        known = {rest(key): key for key in reversed(theirs)} if left else {}
        found |= {key: known[rest(key)] for key in left if rest(key) in known}
        left = [key for key in left if key not in found]
    return found


def _why_lacking(key: Measured, nearest: Measured | None, other: str) -> str:
    if nearest is None:
        return f"is not in {other} run"
    differing = [name for name in Measured._fields if getattr(nearest, name) != getattr(key, name)]
    told = (f"{name.replace('_', ' ')} {getattr(nearest, name)}" for name in differing)
    wanted = (str(getattr(key, name)) for name in differing)
    return f"{other} run has it with {', '.join(told)}, not {', '.join(wanted)}"


def _differences(reference: Run, run: Run) -> Iterator[str]:
    facts = [_facts(each) for each in (reference, run)]
    for name, theirs in facts[0].items():
        if facts[1][name] != theirs:
            yield f"{name}: {theirs or 'unknown'} against {facts[1][name] or 'unknown'}"


def _facts(run: Run) -> dict[str, str]:
    readies = [cell.ready for cell in run.cells if cell.ready]
    facts = {"device": ", ".join(sorted({ready.device_name for ready in readies}))}
    for package in ("torch", "transformers"):
        facts[package] = ", ".join(sorted({ready.versions.get(package, "") for ready in readies} - {""}))
    return facts | {"driver": run.environment.driver or "", "commit": run.environment.commit or ""}
