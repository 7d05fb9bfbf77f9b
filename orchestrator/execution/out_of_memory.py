"""Which workloads won't fit: those at least as large, in every dimension, as one that ran out of memory.

Weights are the same for all workloads of a precision. Keys and values grow with rows and with the tokens of
each, activations with rows and with the tokens of a prompt; and a decode mode adds its own buffers.
"""

from collections.abc import Iterable

from orchestrator.records.keys import WorkloadKey, key_of
from orchestrator.records.names import workload_labels
from schemas.frames import Failed
from schemas.job import Job
from schemas.record import CellRecord


def ran_out(record: CellRecord) -> bool:
    """Whether a workload was too large. Running out while loading does not depend on the workload."""
    failed = isinstance(record.outcome, Failed) and record.outcome.kind == "out-of-memory"
    return failed and record.loaded is not None


def why_no_room(job: Job, too_large: Iterable[Job]) -> str | None:
    """Why this job would run out of memory, judging by a smaller one that did; None if there is none."""
    key = key_of(job)
    for other in map(key_of, too_large):
        if other.variant == key.variant and _at_least_as_large(key.workload, other.workload):
            label = workload_labels({other.workload, key.workload})[other.workload]
            return f"{label or 'in an earlier process it'} ran out of memory"
    return None


def _at_least_as_large(workload: WorkloadKey, limit: WorkloadKey) -> bool:
    if (workload.prompt_tokens is None) != (limit.prompt_tokens is None):
        return False  # prompts of natural length may be longer or shorter
    return all((size or 0) >= (limited or 0) for size, limited in zip(workload, limit, strict=True))
