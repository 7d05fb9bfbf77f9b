"""Prepares AWQ weights for a precision that only reads them, if this environment has AutoAWQ."""

from schemas.job import Job
from workers.protocol.backend import Report
from workers.protocol.errors import Unsupported


def prepare(job: Job, report: Report) -> None:
    """Make this job's checkpoint. Raises `Unsupported` in an environment without AutoAWQ."""
    try:
        from workers.quantization.awq_model import prepare_checkpoint
    except ModuleNotFoundError as error:
        raise Unsupported(
            "this model has no AWQ weights yet, and AutoAWQ, which makes them, isn't installed here",
            f"run qbench-worker awq --calibrate --model {job.model.location}, or pass an AWQ --checkpoint",
        ) from error
    prepare_checkpoint(job, report)
