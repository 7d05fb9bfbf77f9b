"""How long a plan will take, based on earlier runs on this machine; unknown without any.

A worker starts once for all its cells: imports, loading. Each cell then consists of its decode mode's set-up
and its trials, some of them untimed:

    set-up + (batches + untimed) × (prefill × growth of rows and positions + decode × growth of new tokens)

All of these come from the records nearest in size with the same precision, decode mode, model and device.
For a cell that was measured before, they add up to the time that it took. Preparing weights is not included.
"""

from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from math import log
from statistics import fmean, median
from typing import NamedTuple

from orchestrator.planning.plan import Plan
from orchestrator.records.keys import WorkloadKey, key_of
from orchestrator.records.timing import measuring_s
from orchestrator.units import duration
from schemas.environment import Environment
from schemas.frames import Done
from schemas.job import DecodeMode, Job, ModelKind
from schemas.record import CellRecord, Run


class Past(NamedTuple):
    """A cell of an earlier run, and its job."""

    job: Job
    cell: CellRecord


class Estimate(NamedTuple):
    """Seconds for the cells that earlier runs cover, and the names of the others."""

    known_s: float
    known: int
    cells: int
    unknown: list[str]
    budget_s: float | None = None

    def __str__(self) -> str:
        parts = []
        if self.known:
            of = (
                f" for {self.known} of {self.cells} cells" if self.unknown else ", based on earlier runs here"
            )
            parts.append(f"about {duration(self.known_s)}{of}")
        if self.unknown and self.budget_s is not None:
            parts.append(f"at most about {duration(self.budget_s)}, the budget")
        missing = f"; no earlier runs of {', '.join(self.unknown)} here" if self.unknown else ""
        return (", ".join(parts) or "unknown") + missing


def estimate(plan: Plan, machine: Environment, runs: Iterable[Run]) -> Estimate:
    """The time for the cells that are certain to run, based on those of `runs` made on this machine."""
    here = [run for run in runs if _identity(run.environment) == _identity(machine)]
    known = Known(Past(cell.job, cell) for run in here for cell in run.cells if cell.job is not None)
    jobs = [cell.job for cell in plan.certain]
    times_s = [(job, job_s) for job in jobs if (job_s := known.job_s(job)) is not None]
    starts_s = {(job.round, job.precision, job.aa_control): known.start_s(job) for job, _ in times_s}
    cells_s = sum(starts_s.values()) + sum(job_s for _, job_s in times_s)
    pauses_s = (plan.cooldown_s + _between_s(here)) * len(times_s)
    return Estimate(
        known_s=min(cells_s, plan.budget_s or cells_s) + pauses_s + _peaks_s(here, jobs),
        known=len(times_s),
        cells=len(jobs),
        unknown=list(dict.fromkeys(key_of(job).name for job in jobs if known.job_s(job) is None)),
        budget_s=plan.budget_s,
    )


class Known:
    """Times of earlier cells, looked up by job. Answers are cached, because rounds repeat the same jobs."""

    def __init__(self, past: Iterable[Past]) -> None:
        self.sizes: defaultdict[_Predictor, dict[WorkloadKey, list[Past]]] = defaultdict(dict)
        starts_s: defaultdict[_Loading, list[float]] = defaultdict(list)
        for each in past:
            if (start_s := _started_s(each.cell)) is not None:
                starts_s[_loading(each.job)].append(start_s)
            if isinstance(each.cell.outcome, Done):
                for predictor in _predictors(each.job):
                    self.sizes[predictor].setdefault(key_of(each.job).workload, []).append(each)
        self.starts_s = {worker: median(found) for worker, found in starts_s.items()}
        self.times_s: dict[tuple[_Predictor, WorkloadKey], float | None] = {}

    def job_s(self, job: Job) -> float | None:
        """Seconds for a job once its worker is running, from the cells nearest in size; None without any."""
        question = _predictors(job)[-1], key_of(job).workload
        if question not in self.times_s:
            nearest = self._nearest(*question)
            self.times_s[question] = median(_scaled_s(job, each) for each in nearest) if nearest else None
        return self.times_s[question]

    def start_s(self, job: Job) -> float:
        """Seconds from the start of the job's worker to its first set-up; 0 if unknown."""
        return self.starts_s.get(_loading(job), 0.0)

    def _nearest(self, predictor: "_Predictor", key: WorkloadKey) -> list[Past]:
        sizes = self.sizes.get(predictor, {})
        if key in sizes:
            return sizes[key]
        distances = {size: _distance(size, key) for size in sizes}
        least = min(distances.values(), default=None)
        return [each for size, found in sizes.items() if distances[size] == least for each in found]


def _identity(machine: Environment) -> tuple[str, int | None, list[str]]:
    return machine.cpu, machine.cpu_count, [gpu.uuid for gpu in machine.gpus]


class _Loading(NamedTuple):
    """The model and device of a worker, on which its time to start depends."""

    precision: str
    device: str
    kind: ModelKind
    location: str
    outliers: int


class _Predictor(NamedTuple):
    """What two cells must share to predict each other's time: all but the size of the workload."""

    loading: _Loading
    decode: DecodeMode
    prompts: tuple[str, ...] | None


def _loading(job: Job) -> _Loading:
    model = job.model
    return _Loading(job.precision, job.device, model.kind, model.location, model.outliers)


def _predictors(job: Job) -> list[_Predictor]:
    """The keys under which a job's time is stored; the last one is used to look it up.

    Without a fixed prompt length, only runs with the same prompts are comparable.
    """
    load = job.workload
    prompts = [None] if load.prompt_tokens is not None else [None, tuple(load.prompts)]
    return [_Predictor(_loading(job), load.decode, each) for each in prompts]


def _distance(size: WorkloadKey, other: WorkloadKey) -> float:
    pairs = zip(size, other, strict=True)
    return sum(abs(log((1 + (mine or 0)) / (1 + (others or 0)))) for mine, others in pairs)


def _scaled_s(job: Job, past: Past) -> float:
    load, before, trials = job.workload, past.job.workload, past.cell.trials
    prefill_s, decode_s = (
        fmean(trial.prefill_s for trial in trials),
        fmean(trial.decode_s for trial in trials),
    )
    setup_s = past.cell.setup.setup_s if past.cell.setup else 0.0
    spent_s = measuring_s(past.cell) - (_started_s(past.cell) or 0.0) - setup_s
    untimed = max(spent_s / (prefill_s + decode_s) - len(trials), 0.0)
    batches = -(-len(load.prompts) // load.batch_size)
    prompt_tokens = fmean(trial.prompt_tokens for trial in trials)
    positions = load.batch_size * ((load.prompt_tokens or prompt_tokens) + load.depth)
    more_prefill = positions / (before.batch_size * (prompt_tokens + before.depth))
    more_decode = load.new_tokens / fmean(trial.new_tokens for trial in trials)
    return setup_s + (batches + untimed) * (prefill_s * more_prefill + decode_s * more_decode)


def _started_s(cell: CellRecord) -> float | None:
    """From the worker's start to its first set-up, without preparation; None for its later cells."""
    starts = [edge.phase.at_ns for edge in cell.edges if edge.phase.name == "start"]
    ready = [edge.phase.at_ns for edge in cell.edges if edge.phase.name in ("setup", "warmup")]
    if not starts or not ready or starts[0] < (cell.began_ns or 0):
        return None
    return (ready[0] - starts[0]) / 1e9 - ((cell.wall_s or 0.0) - measuring_s(cell))


def _between_s(runs: list[Run]) -> float:
    """Time after a cell in which its worker frees memory or exits; without cooldowns."""
    gaps_s = []
    for run in runs:
        spans_s = [
            (cell.began_ns / 1e9, cell.began_ns / 1e9 + cell.wall_s)
            for cell in run.cells
            if cell.began_ns is not None and cell.wall_s is not None
        ]
        cooldown_s = run.plan.options.cooldown
        gaps_s += [began_s - ended_s - cooldown_s for (_, ended_s), (began_s, _) in pairwise(spans_s)]
    return median(gaps_s or [0.0])


def _peaks_s(runs: list[Run], jobs: list[Job]) -> float:
    """Seconds that measuring the device's peaks takes; 0 if unknown."""
    devices = {job.device for job in jobs}
    took_s = [
        run.peaks.wall_s for run in runs if run.peaks and devices & {job.device for job in run.plan.jobs}
    ]
    return median(took_s or [0.0])
