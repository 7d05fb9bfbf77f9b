"""Names of cells for display, in tables, warnings and progress; with the workload if a run has several."""

from collections.abc import Callable, Collection, Iterable

from orchestrator.records.keys import NO_WORKLOAD, WorkloadKey, key_of
from schemas.job import Job
from schemas.record import CellRecord


def cell_namer(cells: Iterable[Job] | Iterable[CellRecord]) -> Callable[[Job | CellRecord], str]:
    """Function from one of these cells to its name, with its workload if the cells have several.

    How the workloads differ is worked out once.
    """
    workloads = dict.fromkeys(key_of(cell).workload for cell in cells)
    workloads.pop(NO_WORKLOAD, None)
    labels = workload_labels(workloads) | {NO_WORKLOAD: ""}

    def name(cell: Job | CellRecord) -> str:
        key = key_of(cell)
        label = labels[key.workload]
        return f"{key.name} ({label})" if label else key.name

    return name


def workload_labels(workloads: Collection[WorkloadKey]) -> dict[WorkloadKey, str]:
    """How each workload differs from the others, e.g. `depth 4,096`; empty if there is only one.

    Prompts of natural length are not mentioned.
    """
    columns = dict(zip(WorkloadKey._fields, zip(*workloads, strict=True), strict=False))
    varying = {name for name, values in columns.items() if len(set(values)) > 1}
    return {workload: _label(workload, varying) for workload in workloads}


def _label(workload: WorkloadKey, varying: set[str]) -> str:
    words = {
        "batch_size": f"batch {workload.batch_size:,}",
        "depth": f"depth {workload.depth:,}",
        "prompt_tokens": f"prompts of {workload.prompt_tokens or 0:,} tokens",
        "new_tokens": f"{workload.new_tokens:,} new tokens",
    }
    return ", ".join(
        word for name, word in words.items() if name in varying and getattr(workload, name) is not None
    )
