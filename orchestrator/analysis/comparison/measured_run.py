"""A run prepared for comparison: its cells by keys that match across runs, each figure computed once."""

import hashlib
from collections.abc import Collection, Iterable, Iterator
from operator import attrgetter
from typing import NamedTuple

from orchestrator.analysis.agreement import agreements
from orchestrator.analysis.best_mode import Best, best_modes
from orchestrator.analysis.metrics import CellMetrics, analyze_cells
from orchestrator.analysis.rounds import typical_run
from orchestrator.records.keys import CellKey, WorkloadKey, key_of
from schemas.frames import Done
from schemas.job import Job
from schemas.record import CellRecord, Run


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


class MeasuredCell(NamedTuple):
    """One cell over all rounds of a run."""

    records: list[CellRecord]
    rows: list[CellMetrics]
    """Of the rounds that have figures."""
    qualities: dict[int, float]
    """Index of a prompt → agreement with FP16."""


class MeasuredRun(NamedTuple):
    """A run and its figures."""

    run: Run
    cells: dict[CrossRunKey, MeasuredCell]
    bests: list[Best]


def measure_run(run: Run) -> MeasuredRun:
    """Compute the figures of a run."""
    rows = {id(each.cell): each.row for each in analyze_cells(run)}
    groups = groups_of(run)
    cells = {
        key: MeasuredCell(
            records=records,
            rows=[rows[id(record)] for record in records if isinstance(record.outcome, Done)],
            qualities=qualities(key, groups),
        )
        for key, records in groups.items()
    }
    return MeasuredRun(run, cells, best_modes([rows[id(cell)] for cell in typical_run(run).cells]))


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


def qualities(key: CrossRunKey, groups: Groups) -> dict[int, float]:
    """Index of a prompt → agreement with FP16 of the same run, decode mode and workload; empty for FP16."""
    if key.cell.is_baseline:
        return {}
    return agreements(groups[key], groups.get(key._replace(cell=key.cell.baseline), []))


def distinctions(keys: Collection[CrossRunKey]) -> dict[CrossRunKey, str]:
    """How the settings of each differ from those of the others, in words; empty if nothing differs."""
    varying = [name for name, path in SETTINGS.items() if len(set(map(attrgetter(path), keys))) > 1]
    return {key: ", ".join(_words(key, varying)) for key in keys}


def setting(key: CrossRunKey, name: str) -> object:
    """The value of a setting, by its name in `SETTINGS`."""
    return attrgetter(SETTINGS[name])(key)


def _words(key: CrossRunKey, names: Iterable[str]) -> Iterator[str]:
    for name in names:
        if (value := setting(key, name)) is not None:
            yield f"{name} {value}"
