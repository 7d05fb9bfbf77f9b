"""Which workloads there is no room for: those no smaller, in anything, than one that ran out of memory.

Weights are the same for all workloads of a precision. Keys and values grow with rows and with the tokens of
each, activations with rows and with the tokens of a prompt; and a decode mode has its own buffers on top.
"""

from collections.abc import Iterable

from orchestrator.records.workloads import WorkloadKey, key_of, workload_labels
from schemas.frames import Failed
from schemas.job import Job
from schemas.record import CellRecord


def ran_out(record: CellRecord) -> bool:
    """Whether a workload was too large. What runs out while it loads would do so with any."""
    failed = isinstance(record.outcome, Failed) and record.outcome.kind == "out-of-memory"
    return failed and record.loaded is not None


def why_no_room(job: Job, too_large: Iterable[Job]) -> str | None:
    """Which of the jobs that ran out of memory says that this one would too; None where none does."""
    key = key_of(job.workload)
    for other in too_large:
        alike = (other.precision, other.workload.decode) == (job.precision, job.workload.decode)
        limit = key_of(other.workload)
        if alike and _no_smaller(key, limit):
            return f"{workload_labels({limit, key})[limit] or 'in an earlier process it'} ran out of memory"
    return None


def _no_smaller(key: WorkloadKey, limit: WorkloadKey) -> bool:
    if (key.prompt_tokens is None) != (limit.prompt_tokens is None):
        return False  # prompts of natural length may be longer or shorter
    return all((mine or 0) >= (others or 0) for mine, others in zip(key, limit, strict=True))
