"""Comparison of two runs: the cells of both, how much they differ, and what can't be compared.

Cells are matched by precision, decode mode, model, prompts and workload. For a cell without a counterpart,
the settings that differ are listed. Torch, GPU and commit may differ, since that is often the question; they
are listed too.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from itertools import combinations
from operator import attrgetter
from statistics import fmean, median_low
from typing import NamedTuple

import msgspec

from orchestrator.analysis.agreement import agreements
from orchestrator.analysis.intervals import Comparison, Sample, compare_all, of_shares, of_two
from orchestrator.analysis.metrics import CellMetrics, measure_cell, reason
from orchestrator.records.keys import CellKey, WorkloadKey, key_of
from schemas.frames import Done
from schemas.job import DecodeMode, Job
from schemas.record import CellRecord, Run

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


class CrossRunKey(NamedTuple):
    """The identity of a cell among several runs, which may be of different models and prompts."""

    cell: CellKey
    """Without the round."""
    model: str
    outliers: int
    prompts: str


SETTINGS = {
    "model": "model",
    "outliers": "outliers",
    "prompts": "prompts",
    **{name.replace("_", " "): f"cell.workload.{name}" for name in WorkloadKey._fields},
}
"""What may differ between cells of one precision and decode mode: name for people → path in the key."""


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
    """The result of comparing two runs."""

    pairs: list[Pair]
    unmatched: list[str]
    """Why a cell has no counterpart, a line each."""
    differences: list[str]
    """Differences between machines and software, a line each."""


def compare_runs(reference: Run, run: Run) -> RunComparison:
    """`run` over `reference`."""
    ours, theirs = groups_of(run), groups_of(reference)
    shared = [key for key in theirs if key in ours]
    names = what_tells(shared)
    drafts = [draft for key in shared for draft in _drafts(key, names[key], theirs, ours)]
    return RunComparison(
        pairs=_drawn(drafts),
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


Groups = dict[CrossRunKey, list[CellRecord]]


def groups_of(run: Run) -> Groups:
    """The cells of all rounds by key."""
    found: Groups = {}
    for cell in run.cells:
        if cell.job is not None and not cell.job.aa_control:
            found.setdefault(_cross_run_key(cell.job), []).append(cell)
    return found


def _cross_run_key(job: Job) -> CrossRunKey:
    load, model = job.workload, job.model
    digest = hashlib.sha256("\n".join(load.prompts).encode()).hexdigest()[:8]
    # A random model has no texts: its prompts are random tokens, and only their number counts.
    prompts = f"{len(load.prompts)} {'drawn' if model.is_random else f'({digest})'}"
    return CrossRunKey(key_of(job).without_round, model.name, model.outliers, prompts)


class _Draft(NamedTuple):
    """A pair without its comparison, which is either bootstrapped with all others, or already known."""

    pair: Callable[..., Pair]
    rests_on: Sample | Comparison


def _drawn(drafts: list[_Draft]) -> list[Pair]:
    samples = [each.rests_on for each in drafts if isinstance(each.rests_on, Sample)]
    drawn = iter(compare_all(samples))
    return [
        each.pair(comparison=next(drawn) if isinstance(each.rests_on, Sample) else each.rests_on)
        for each in drafts
    ]


def _drafts(key: CrossRunKey, workload: str, theirs: Groups, ours: Groups) -> Iterator[_Draft]:
    pair = partial(Pair, precision=key.cell.precision, decode=key.cell.decode, workload=workload)
    rows, reference_rows = (list(_rows(groups[key])) for groups in (ours, theirs))
    for figure, field in FIGURES.items():
        values, references = (
            [value for row in each if (value := getattr(row, field))] for each in (rows, reference_rows)
        )
        if values and references:
            middles = {"reference": median_low(references), "value": median_low(values)}
            yield _Draft(partial(pair, figure=figure, **middles), of_two(values, references))
    yield from _token_drafts(key, pair, theirs, ours)


def _token_drafts(
    key: CrossRunKey, pair: Callable[..., Pair], theirs: Groups, ours: Groups
) -> Iterator[_Draft]:
    """How far tokens agree with FP16's within each run, and between the two runs."""
    before, now = qualities(key, theirs), qualities(key, ours)
    if prompts := [at for at in now if at in before]:
        shares, references = ([each[at] for at in prompts] for each in (now, before))
        if sample := of_shares(shares, references):
            means = {"reference": fmean(references), "value": fmean(shares)}
            yield _Draft(partial(pair, figure=QUALITY, **means), sample)
    if same := list(agreements(ours[key], theirs[key]).values()):
        diverged = sum(share < 1 for share in same)
        why = f"different tokens in {diverged} of {len(same)} prompts" if diverged else "the same"
        found = Comparison(ratio=fmean(same), rounds=len(same), why=why)
        yield _Draft(partial(pair, figure=TOKENS, reference=1.0, value=found.ratio), found)


def qualities(key: CrossRunKey, groups: Groups) -> dict[int, float]:
    """Index of a prompt → agreement with FP16 of the same run, decode mode and workload; empty for FP16."""
    if key.cell.is_baseline:
        return {}
    return agreements(groups[key], groups.get(key._replace(cell=key.cell.baseline), []))


def _rows(cells: list[CellRecord]) -> Iterator[CellMetrics]:
    return (measure_cell(cell) for cell in cells if isinstance(cell.outcome, Done))


def what_tells(keys: Collection[CrossRunKey]) -> dict[CrossRunKey, str]:
    """How the settings of each differ from those of the others, in words; empty if nothing differs."""
    telling = [name for name, path in SETTINGS.items() if len(set(map(attrgetter(path), keys))) > 1]
    return {key: ", ".join(_words(key, telling)) for key in keys}


def _words(key: CrossRunKey, names: Iterable[str]) -> Iterator[str]:
    for name in names:
        if (value := _setting(key, name)) is not None:
            yield f"{name} {value}"


def _unmatched(ours: Groups, theirs: Groups, other: str) -> Iterator[str]:
    """A line for each of `ours` that is missing or failed in the `other` run."""
    nearest = _nearest([key for key in ours if key not in theirs], list(theirs))
    for key, cells in ours.items():
        name = " ".join(key.cell.variant)
        if key not in theirs:
            yield f"{name}: {_why_lacking(key, nearest.get(key), other)}"
        elif not _has_figures(theirs[key]) and _has_figures(cells):
            outcome = theirs[key][0].outcome
            why = "" if isinstance(outcome, Done) else reason(outcome)
            yield f"{name}: has no figures in {other} run: {why}"


def _has_figures(cells: list[CellRecord]) -> bool:
    return any(isinstance(cell.outcome, Done) for cell in cells)


def _nearest(lacking: list[CrossRunKey], theirs: list[CrossRunKey]) -> dict[CrossRunKey, CrossRunKey]:
    """For each key that they lack, the one of theirs with the same name that differs in the fewest fields.

    It is looked up ignoring one field at a time, then two, and so on: comparing every pair would take minutes
    for thousands of keys.
    """
    found: dict[CrossRunKey, CrossRunKey] = {}
    variants = {key.cell.variant for key in theirs}
    left = [key for key in lacking if key.cell.variant in variants]
    for differing in (names for count in range(len(SETTINGS)) for names in combinations(SETTINGS, count + 1)):
        same = (path for name, path in SETTINGS.items() if name not in differing)
        rest = attrgetter("cell.variant", *same)
        known = {rest(key): key for key in reversed(theirs)} if left else {}
        found |= {key: known[rest(key)] for key in left if rest(key) in known}
        left = [key for key in left if key not in found]
    return found


def _setting(key: CrossRunKey, name: str) -> object:
    return attrgetter(SETTINGS[name])(key)


def _without_ratio(shared: list[CrossRunKey], theirs: Groups, ours: Groups) -> Iterator[str]:
    for key in shared:
        before = qualities(key, theirs)
        if before and not any(before.values()) and qualities(key, ours):
            yield f"{' '.join(key.cell.variant)}: quality has no ratio, since it is 0% in the first run"


def _why_lacking(key: CrossRunKey, nearest: CrossRunKey | None, other: str) -> str:
    if nearest is None:
        return f"is not in {other} run"
    differing = [name for name in SETTINGS if _setting(nearest, name) != _setting(key, name)]
    told = (f"{name} {_setting(nearest, name)}" for name in differing)
    wanted = (str(_setting(key, name)) for name in differing)
    return f"{other} run has it with {', '.join(told)}, not {', '.join(wanted)}"


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
