"""`qbench-worker PRECISION --calibrate`: make a precision's weights ahead of a run, and measure nothing."""

from collections.abc import Mapping

import click

from orchestrator.cache import cache_folder
from orchestrator.errors import BadInput
from orchestrator.execution.progress import ERRANDS
from orchestrator.execution.worker_process import WorkerProcess
from orchestrator.planning.plan import Cell
from orchestrator.precisions.catalog import Precision, choose
from orchestrator.precisions.interpreter import lent_packages, worker_command, worker_environment
from orchestrator.units import duration
from schemas.frames import Failed, Phase, Prepared, Progress
from schemas.options import Options


def require_calibration(name: str, precisions: Mapping[str, Precision], options: Options) -> None:
    """Raise `BadInput` where there would be nothing to calibrate."""
    (precision,) = choose(precisions, [name])
    if not precision.calibrated:
        others = ", ".join(each.name for each in precisions.values() if each.calibrated)
        raise BadInput("--calibrate", name, "this precision needs no calibration", f"Those that do: {others}")
    if checkpoint := options.checkpoint.get(name):
        problem = "a checkpoint is calibrated already"
        raise BadInput("--checkpoint", f"{name}={checkpoint}", problem, "Leave it or --calibrate out")
    if (options.model or "").startswith("random:"):
        problem = "random weights are not calibrated"
        raise BadInput("--calibrate", name, problem, "Name a --model with weights of its own")


def calibrate_cell(cell: Cell, timeout_s: float) -> int:
    """Let the cell's worker prepare its weights, and tell where they lie; 0, or 1 where it failed.

    What libraries print goes to a log in the cache folder.
    """
    job = cell.job
    if job.model.notice:
        click.echo(job.model.notice, err=True)
    log = cache_folder() / "logs" / f"calibrate-{job.precision}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with lent_packages([cell.precision]) as lent:
        command = [*worker_command(cell.interpreter, cell.precision.module), "--prepare"]
        environment = worker_environment(cell.interpreter, lent)
        with WorkerProcess(command, environment, job, log) as worker:
            for frame in worker.frames(timeout_s):
                if isinstance(frame, Phase):
                    if frame.name in ERRANDS:
                        click.echo(f"{job.precision}: {ERRANDS[frame.name]}", err=True)
                    worker.acknowledge()
                elif isinstance(frame, Progress):
                    click.echo(f"{frame.message} {(frame.done or 0) + 1} of {frame.total}", err=True)
                elif isinstance(frame, Prepared):
                    click.echo(_describe(job.precision, job.model.name, frame))
                    return 0
                elif isinstance(frame, Failed):
                    hint = f" ({frame.hint})" if frame.hint else ""
                    click.echo(f"error: {frame.message}{hint}; the log is {log}", err=True)
    return 1


def _describe(precision: str, model: str, prepared: Prepared) -> str:
    state = "lie now" if prepared.anew else "lay already"
    note = prepared.calibration
    return (
        f"{precision}: calibrated weights of {model} {state} in {prepared.folder}\n"
        f"made in {duration(note.took_s)} with {note}"
    )
