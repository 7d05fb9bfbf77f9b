"""`qbench-worker PRECISION --calibrate`: make a precision's weights ahead of a run, without measuring."""

from collections.abc import Mapping

import click

from orchestrator.cache import cache_folder
from orchestrator.errors import BadInput
from orchestrator.execution.progress import SETUP_MESSAGES
from orchestrator.execution.worker_session import WorkerSession, separate_start
from orchestrator.planning.plan import Cell
from orchestrator.precisions.catalog import Precision, choose
from orchestrator.units import duration
from schemas.frames import Failed, Phase, Prepared, Progress
from schemas.options import Options


def require_calibration(name: str, precisions: Mapping[str, Precision], options: Options) -> None:
    """Raise `BadInput` if there is nothing to calibrate."""
    (precision,) = choose(precisions, [name])
    if not precision.calibrated:
        others = ", ".join(each.name for each in precisions.values() if each.calibrated)
        raise BadInput("--calibrate", name, "this precision needs no calibration", f"Those that do: {others}")
    if checkpoint := options.checkpoint.get(name):
        problem = "a checkpoint is already calibrated"
        raise BadInput("--checkpoint", f"{name}={checkpoint}", problem, "Omit it or --calibrate")
    if (options.model or "").startswith("random:"):
        problem = "random weights are not calibrated"
        raise BadInput("--calibrate", name, problem, "Name a --model with real weights")


def calibrate_cell(cell: Cell, timeout_s: float) -> int:
    """Let the cell's worker prepare its weights, and print their folder. Returns 0, or 1 if it failed.

    The output of libraries goes to a log in the cache folder.
    """
    job = cell.job
    if job.model.notice:
        click.echo(job.model.notice, err=True)
    log = cache_folder() / "logs" / f"calibrate-{job.precision}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        separate_start(cell, log, ("--prepare",)) as start,
        WorkerSession(start, timeout_s, sample_memory=False) as session,
    ):
        for frame, _ in session.events(job):
            match frame:
                case Phase() if frame.name in SETUP_MESSAGES:
                    click.echo(f"{job.precision}: {SETUP_MESSAGES[frame.name]}", err=True)
                case Progress():
                    click.echo(f"{frame.message} {(frame.done or 0) + 1} of {frame.total}", err=True)
                case Prepared():
                    click.echo(_describe(job.precision, job.model.name, frame))
                    return 0
                case Failed():
                    hint = f" ({frame.hint})" if frame.hint else ""
                    click.echo(f"error: {frame.message}{hint}; the log is {log}", err=True)
    return 1


def _describe(precision: str, model: str, prepared: Prepared) -> str:
    state = "saved to" if prepared.anew else "already in"
    note = prepared.calibration
    return (
        f"{precision}: calibrated weights of {model} {state} {prepared.folder}\n"
        f"made in {duration(note.took_s)} with {note}"
    )
