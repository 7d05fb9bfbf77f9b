"""What a cell is called wherever people read of it: in tables, warnings, progress and file names."""

from schemas.job import Job
from schemas.record import CellRecord


def cell_name(cell: CellRecord) -> str:
    """The precision, and how decode steps are issued where that is not the usual way, e.g. `fp16 graph`."""
    return cell.precision if cell.job is None else job_name(cell.job)


def job_name(job: Job) -> str:
    """The same of a cell yet to be measured."""
    decode = job.workload.decode
    name = job.precision if decode == "eager" else f"{job.precision} {decode}"
    return f"{name} (A/A)" if job.twin else name


def file_stem(job: Job) -> str:
    """A name that no other cell of the run has, e.g. `fp16-graph-b8-p512-d4096-n64-r3`."""
    return _stem(job, f"-n{job.workload.new_tokens}")


def older_file_stem(job: Job) -> str:
    """The same in runs of before these could have several counts of new tokens."""
    return _stem(job, "")


def _stem(job: Job, new: str) -> str:
    load = job.workload
    batch = f"-b{load.batch_size}" if load.batch_size > 1 else ""
    prompt = "" if load.prompt_tokens is None else f"-p{load.prompt_tokens}"
    depth = f"-d{load.depth}" if load.depth else ""
    round_ = f"-r{job.round}" if job.round else ""
    return f"{job.precision}-{load.decode}{batch}{prompt}{depth}{new}{round_}{'-aa' if job.twin else ''}"
