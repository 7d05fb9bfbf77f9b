"""Which workloads won't fit: those at least as large, in every dimension, as one that ran out of memory.

Weights are the same for all workloads of a precision. Keys and values grow with rows and with the tokens of
each, activations with rows and with the tokens of a prompt; and a decode mode adds its own buffers.
"""

from collections.abc import Iterable

from orchestrator.records.workloads import WorkloadKey, key_of, workload_labels
from schemas.frames import Failed
from schemas.job import Job
from schemas.record import CellRecord


def ran_out(record: CellRecord) -> bool:
    """Whether a workload was too large. Running out during loading says nothing about the workload."""
    failed = isinstance(record.outcome, Failed) and record.outcome.kind == "out-of-memory"
    return failed and record.loaded is not None


def why_no_room(job: Job, too_large: Iterable[Job]) -> str | None:
    """Which job that ran out of memory shows that this one would too; None if none does."""
    key = key_of(job.workload)
    for other in too_large:
        alike = (other.precision, other.workload.decode) == (job.precision, job.workload.decode)
        limit = key_of(other.workload)
        if alike and _at_least_as_large(key, limit):
            return f"{workload_labels({limit, key})[limit] or 'in an earlier process it'} ran out of memory"
    return None


def _at_least_as_large(key: WorkloadKey, limit: WorkloadKey) -> bool:
    """In every dimension."""
    if (key.prompt_tokens is None) != (limit.prompt_tokens is None):
        return False  # prompts of natural length may be longer or shorter
    return all((mine or 0) >= (others or 0) for mine, others in zip(key, limit, strict=True))
