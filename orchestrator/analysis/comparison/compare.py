"""Comparison of two runs: the cells of both, how much they differ, and which can't be compared.

Cells are matched by precision, decode mode, model, prompts and workload. For a cell without a counterpart,
the settings that differ are listed. Torch, GPU and commit may differ, since that is often the question; they
are listed too.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from operator import attrgetter
from statistics import fmean, median_low
from typing import NamedTuple

import msgspec

from orchestrator.analysis.agreement import agreements
from orchestrator.analysis.comparison.measured_run import (
    SETTINGS,
    CrossRunKey,
    MeasuredCell,
    MeasuredRun,
    distinctions,
    setting,
)
from orchestrator.analysis.intervals import Comparison, Sample, compare_all, of_shares, of_two
from orchestrator.analysis.metrics import reason
from schemas.frames import Done
from schemas.job import DecodeMode
from schemas.record import Run

FIGURES = {
    "decode": "decode_tok_s",
    "ttft": "ttft_s",
    "prefill": "prefill_tok_s",
    "loaded": "footprint_bytes",
    "peak": "peak_bytes",
}
"""Figures compared process by process → their fields in `CellMetrics`."""
QUALITY = "quality"
"""Agreement with FP16's tokens of the same run, compared prompt by prompt."""
TOKENS = "tokens"
"""Agreement of the second run's tokens with the first's."""
MEMORY = {"loaded", "peak"}
EXACT = {*MEMORY, TOKENS}
"""Figures that don't vary between processes, so one round is enough."""


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of a cell that both runs have: the second run's over the first's."""

    precision: str
    decode: DecodeMode
    workload: str
    """How it differs from others of the same precision and mode; empty if there are none."""
    figure: str
    reference: float
    value: float
    comparison: Comparison


class RunComparison(msgspec.Struct, frozen=True, kw_only=True):
    """The result of comparing two runs, which `--json` prints."""

    pairs: list[Pair]
    unmatched: list[str]
    """Why a cell has no counterpart, a line each."""
    differences: list[str]
    """Differences between machines and software, a line each."""


def compare_runs(reference: MeasuredRun, run: MeasuredRun) -> RunComparison:
    """Ratios of `run` over `reference`, for every figure of a cell that both have."""
    ours, theirs = run.cells, reference.cells
    shared = [key for key in theirs if key in ours]
    names = distinctions(shared)
    drafts = [draft for key in shared for draft in _drafts(key, names[key], theirs[key], ours[key])]
    return RunComparison(
        pairs=_pairs(drafts),
        unmatched=list(
            dict.fromkeys(
                [
                    *_unmatched(theirs, ours, "the second"),
                    *_unmatched(ours, theirs, "the first"),
                    *_without_ratio(shared, theirs, ours),
                ]
            )
        ),
        differences=list(_differences(reference.run, run.run)),
    )


Cells = dict[CrossRunKey, MeasuredCell]


class _Draft(NamedTuple):
    """A pair without its comparison, which is either known already or bootstrapped along with all others."""

    pair: Callable[..., Pair]
    basis: Sample | Comparison


def _pairs(drafts: list[_Draft]) -> list[Pair]:
    compared = iter(compare_all([each.basis for each in drafts if isinstance(each.basis, Sample)]))
    return [
        each.pair(comparison=next(compared) if isinstance(each.basis, Sample) else each.basis)
        for each in drafts
    ]


def _drafts(key: CrossRunKey, workload: str, theirs: MeasuredCell, ours: MeasuredCell) -> Iterator[_Draft]:
    pair = partial(Pair, precision=key.cell.precision, decode=key.cell.decode, workload=workload)
    for figure, field in FIGURES.items():
        values, references = (
            [value for row in each.rows if (value := getattr(row, field))] for each in (ours, theirs)
        )
        if values and references:
            medians = {"reference": median_low(references), "value": median_low(values)}
            yield _Draft(partial(pair, figure=figure, **medians), of_two(values, references))
    yield from _token_drafts(pair, theirs, ours)


def _token_drafts(pair: Callable[..., Pair], theirs: MeasuredCell, ours: MeasuredCell) -> Iterator[_Draft]:
    """How far tokens agree with FP16's within each run, and between the two runs."""
    before, now = theirs.qualities, ours.qualities
    if prompts := [at for at in now if at in before]:
        shares, references = ([each[at] for at in prompts] for each in (now, before))
        if sample := of_shares(shares, references):
            means = {"reference": fmean(references), "value": fmean(shares)}
            yield _Draft(partial(pair, figure=QUALITY, **means), sample)
    if same := list(agreements(ours.records, theirs.records).values()):
        diverged = sum(share < 1 for share in same)
        why = f"different tokens in {diverged} of {len(same)} prompts" if diverged else "the same"
        found = Comparison(ratio=fmean(same), rounds=len(same), why=why)
        yield _Draft(partial(pair, figure=TOKENS, reference=1.0, value=found.ratio), found)


def _unmatched(ours: Cells, theirs: Cells, other: str) -> Iterator[str]:
    """A line for each of `ours` that is missing or failed in the `other` run."""
    nearest = _nearest([key for key in ours if key not in theirs], list(theirs))
    for key, cell in ours.items():
        name = " ".join(key.cell.variant)
        if key not in theirs:
            yield f"{name}: {_why_missing(key, nearest.get(key), other)}"
        elif not theirs[key].rows and cell.rows:
            outcome = theirs[key].records[0].outcome
            why = "" if isinstance(outcome, Done) else reason(outcome)
            yield f"{name}: has no figures in {other} run: {why}"


def _nearest(missing: list[CrossRunKey], theirs: list[CrossRunKey]) -> dict[CrossRunKey, CrossRunKey]:
    """For each missing key, the one of theirs with its precision and decode mode that differs in the fewest
    settings.

    It is looked up ignoring one field at a time, then two, and so on: comparing every pair would take minutes
    for thousands of keys.
    """
    found: dict[CrossRunKey, CrossRunKey] = {}
    variants = {key.cell.variant for key in theirs}
    left = [key for key in missing if key.cell.variant in variants]
    for differing in (names for count in range(len(SETTINGS)) for names in combinations(SETTINGS, count + 1)):
        same = (path for name, path in SETTINGS.items() if name not in differing)
        rest = attrgetter("cell.variant", *same)
        known = {rest(key): key for key in reversed(theirs)} if left else {}
        found |= {key: known[rest(key)] for key in left if rest(key) in known}
        left = [key for key in left if key not in found]
    return found


def _without_ratio(shared: list[CrossRunKey], theirs: Cells, ours: Cells) -> Iterator[str]:
    for key in shared:
        before = theirs[key].qualities
        if before and not any(before.values()) and ours[key].qualities:
            yield f"{' '.join(key.cell.variant)}: quality has no ratio, since it is 0% in the first run"


def _why_missing(key: CrossRunKey, nearest: CrossRunKey | None, other: str) -> str:
    if nearest is None:
        return f"is not in {other} run"
    differing = [name for name in SETTINGS if setting(nearest, name) != setting(key, name)]
    has = (f"{name} {setting(nearest, name)}" for name in differing)
    wanted = (str(setting(key, name)) for name in differing)
    return f"{other} run has it with {', '.join(has)}, not {', '.join(wanted)}"


def _differences(reference: Run, run: Run) -> Iterator[str]:
    facts = [_facts(each) for each in (reference, run)]
    for name, theirs in facts[0].items():
        if facts[1][name] != theirs:
            yield f"{name}: {theirs or 'unknown'} vs. {facts[1][name] or 'unknown'}"


def _facts(run: Run) -> dict[str, str]:
    readies = [cell.ready for cell in run.cells if cell.ready]
    facts = {"device": ", ".join(sorted({ready.device_name for ready in readies}))}
    for package in ("torch", "transformers"):
        facts[package] = ", ".join(sorted({ready.versions.get(package, "") for ready in readies} - {""}))
    return facts | {"driver": run.environment.driver or "", "commit": run.environment.commit or ""}
