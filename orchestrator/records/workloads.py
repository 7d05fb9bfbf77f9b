"""Which cells may be compared: those of one workload, and with FP16 only in the same decode mode."""

from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from orchestrator.records.names import cell_name, job_name
from schemas.frames import Done
from schemas.job import DecodeMode, Job, Workload
from schemas.record import CellRecord

BASELINE = "fp16"


class WorkloadKey(NamedTuple):
    """What a workload is, apart from its decode mode."""

    prompt_tokens: int | None = None
    depth: int = 0
    batch_size: int = 1
    new_tokens: int = 0


def workload_key(cell: CellRecord) -> WorkloadKey:
    """The same for cells that differ in precision and decode mode only."""
    if cell.job is None:  # left out before there was a job: it has no figures either
        return WorkloadKey()
    return key_of(cell.job.workload)


def key_of(load: Workload) -> WorkloadKey:
    """The same of a workload yet to be measured."""
    return WorkloadKey(load.prompt_tokens, load.depth, load.batch_size, load.new_tokens)


def decode_mode(cell: CellRecord) -> DecodeMode:
    return "eager" if cell.job is None else cell.job.workload.decode


Baselines = dict[tuple[WorkloadKey, DecodeMode], CellRecord]


def find_baselines(cells: Iterable[CellRecord]) -> Baselines:
    """The measured FP16 cells of one round, each by what it is the baseline of."""
    found: Baselines = {}
    for cell in cells:
        if cell.precision == BASELINE and not is_twin(cell) and isinstance(cell.outcome, Done):
            found.setdefault((workload_key(cell), decode_mode(cell)), cell)
    return found


def baseline_of(cell: CellRecord, baselines: Baselines) -> CellRecord | None:
    """The measured FP16 cell of the same workload and decode mode; for an FP16 cell itself."""
    if cell.precision == BASELINE and not is_twin(cell):
        return cell if isinstance(cell.outcome, Done) else None
    return baselines.get((workload_key(cell), decode_mode(cell)))


def is_twin(cell: CellRecord) -> bool:
    """Whether this is FP16 once more, to be held against itself."""
    return cell.job is not None and cell.job.twin


def round_of(cell: CellRecord) -> int:
    return 0 if cell.job is None else cell.job.round


def by_workload(cells: Iterable[CellRecord]) -> dict[WorkloadKey, list[CellRecord]]:
    """Workloads in the order in which they first appear, with their cells."""
    groups: dict[WorkloadKey, list[CellRecord]] = {}
    for cell in cells:
        if cell.job is not None:
            groups.setdefault(workload_key(cell), []).append(cell)
    return groups


def workload_labels(keys: Collection[WorkloadKey]) -> dict[WorkloadKey, str]:
    """What tells each workload from the others, e.g. `depth 4,096`; nothing where it is the only one.

    Prompts of natural length go without mention.
    """
    columns = dict(zip(WorkloadKey._fields, zip(*keys, strict=True), strict=False))
    telling = {name for name, values in columns.items() if len(set(values)) > 1}
    return {key: _label(key, telling) for key in keys}


def _label(key: WorkloadKey, telling: set[str]) -> str:
    words = {
        "batch_size": f"batch {key.batch_size:,}",
        "depth": f"depth {key.depth:,}",
        "prompt_tokens": f"prompts of {key.prompt_tokens or 0:,} tokens",
        "new_tokens": f"{key.new_tokens:,} new tokens",
    }
    return ", ".join(
        word for name, word in words.items() if name in telling and getattr(key, name) is not None
    )


def full_name(cell: CellRecord, cells: Iterable[CellRecord]) -> str:
    """A cell's name among the `cells` of its run, with its workload where there are several."""
    return full_names(cells)(cell)


def full_names(cells: Iterable[CellRecord]) -> Callable[[CellRecord], str]:
    """The same for many of them, with what tells them apart found out once."""
    name = job_names(cell.job for cell in cells if cell.job)
    return lambda cell: cell_name(cell) if cell.job is None else name(cell.job)


def job_names(jobs: Iterable[Job]) -> Callable[[Job], str]:
    """What each of these jobs is called among them: by its workload too where there are several."""
    labels = workload_labels(dict.fromkeys(key_of(job.workload) for job in jobs))

    def name(job: Job) -> str:
        label = labels[key_of(job.workload)]
        return f"{job_name(job)} ({label})" if label else job_name(job)

    return name
