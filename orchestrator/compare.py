"""Two runs held against each other: what both measured, by how much it differs, and what can't be compared.

Cells are matched by what was measured: precision, decode mode, model, prompts and workload. Where one has no
counterpart it is said which of these differ. Torch, GPU and commit may differ, since that is often the
question; they are told.
"""

import hashlib
from collections.abc import Iterable, Iterator
from functools import partial
from statistics import fmean
from typing import NamedTuple

import msgspec

from orchestrator.agreement import agreements
from orchestrator.intervals import Comparison, compare_shares, compare_unpaired
from orchestrator.metrics import CellMetrics, measure_cell, reason
from orchestrator.workloads import BASELINE, is_twin
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
"""What is compared process by process → its field in `CellMetrics`."""
QUALITY = "quality"
"""Agreement with FP16's tokens of the same run, compared prompt by prompt."""
TOKENS = "tokens"
"""Agreement of the second run's tokens with the first's."""
MEMORY = {"loaded", "peak"}
EXACT = {*MEMORY, TOKENS}
"""Figures that don't vary from one process to the next: one round tells all of them."""


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


def compare_runs(reference: Run, run: Run) -> RunComparison:
    """`run` over `reference`."""
    ours, theirs = groups_of(run), groups_of(reference)
    shared = [key for key in theirs if key in ours]
    return RunComparison(
        pairs=[
            pair
            for key in shared
            for pair in (
                *_pairs(key, shared, theirs[key], ours[key]),
                *_token_pairs(key, shared, theirs, ours),
            )
        ],
        unmatched=list(
            dict.fromkeys(
                [
                    *_unmatched(theirs, ours, "the second"),
                    *_unmatched(ours, theirs, "the first"),
                    *_without_ratio(shared, theirs, ours),
                ]
            )
        ),
        differences=list(_differences(reference, run)),
    )


Groups = dict[Measured, list[CellRecord]]


def groups_of(run: Run) -> Groups:
    """The cells of all rounds by what was measured."""
    found: Groups = {}
    for cell in run.cells:
        if cell.job is not None and not is_twin(cell):
            found.setdefault(_measured(cell), []).append(cell)
    return found


def _measured(cell: CellRecord) -> Measured:
    assert cell.job
    load, model = cell.job.workload, cell.job.model
    digest = hashlib.sha256("\n".join(load.prompts).encode()).hexdigest()[:8]
    # A random model has no texts: its prompts are drawn, and only their number counts.
    prompts = f"{len(load.prompts)} {'drawn' if model.is_random else f'({digest})'}"
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
    key: Measured, shared: list[Measured], references: list[CellRecord], cells: list[CellRecord]
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
                workload=what_tells(key, shared),
                figure=figure,
                reference=sorted(theirs)[(len(theirs) - 1) // 2],
                value=sorted(values)[(len(values) - 1) // 2],
                comparison=found,
            )


def _token_pairs(key: Measured, shared: list[Measured], theirs: Groups, ours: Groups) -> Iterator[Pair]:
    """How far tokens agree with FP16's in either run, and with each other over both."""
    before, now = qualities(key, theirs), qualities(key, ours)
    prompts = [at for at in now if at in before]
    pair = partial(Pair, precision=key.precision, decode=key.decode_mode, workload=what_tells(key, shared))
    if prompts:
        shares, references = ([each[at] for at in prompts] for each in (now, before))
        if found := compare_shares(shares, references):
            yield pair(figure=QUALITY, reference=fmean(references), value=fmean(shares), comparison=found)
    if same := list(agreements(ours[key], theirs[key]).values()):
        parted = sum(share < 1 for share in same)
        why = f"other tokens in {parted} of {len(same)} prompts" if parted else "the same"
        found = Comparison(ratio=fmean(same), rounds=len(same), why=why)
        yield pair(figure=TOKENS, reference=1.0, value=found.ratio, comparison=found)


def qualities(key: Measured, groups: Groups) -> dict[int, float]:
    """Index of a prompt → agreement with FP16 of the same run, decode mode and workload; none of FP16."""
    if key.precision == BASELINE:
        return {}
    return agreements(groups[key], groups.get(key._replace(precision=BASELINE), []))


def _rows(cells: list[CellRecord]) -> Iterator[CellMetrics]:
    return (measure_cell(cell) for cell in cells if isinstance(cell.outcome, Done))


def what_tells(key: Measured, shared: list[Measured]) -> str:
    """The words in which a workload differs from others of its kind; none where nothing does."""
    telling = [
        name
        for name in Measured._fields[2:]
        if any(getattr(other, name) != getattr(key, name) for other in shared)
    ]
    return ", ".join(
        f"{name.replace('_', ' ')} {value}" for name in telling if (value := getattr(key, name)) is not None
    )


def _unmatched(ours: Groups, theirs: Groups, other: str) -> Iterator[str]:
    """A line for each of `ours` that the `other` run lacks, or in which one of the two failed."""
    for key, cells in ours.items():
        name = f"{key.precision} {key.decode_mode}"
        if key not in theirs:
            yield f"{name}: {_why_lacking(key, theirs, other)}"
        elif not any(_rows(theirs[key])) and any(_rows(cells)):
            outcome = theirs[key][0].outcome
            why = "" if isinstance(outcome, Done) else reason(outcome)
            yield f"{name}: has no figures in {other} run: {why}"


def _without_ratio(shared: list[Measured], theirs: Groups, ours: Groups) -> Iterator[str]:
    for key in shared:
        before = qualities(key, theirs)
        if before and not any(before.values()) and qualities(key, ours):
            yield f"{key.precision} {key.decode_mode}: quality has no ratio, since it is 0% in the first run"


def _why_lacking(key: Measured, theirs: Iterable[Measured], other: str) -> str:
    alike = [each for each in theirs if each[:2] == key[:2]]
    if not alike:
        return f"is not in {other} run"
    nearest = min(alike, key=lambda each: sum(one != two for one, two in zip(each, key, strict=True)))
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
