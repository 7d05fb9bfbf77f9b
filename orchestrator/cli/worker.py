"""`qbench-worker`: run one worker in the foreground, to see what it sends and where it fails.

On a terminal, frames are shown in readable form, with NVML's figures at each phase edge. Into a pipe they are
written as the JSON Lines that a run would read. The worker's stderr is passed through.
"""

import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import click
import msgspec

from orchestrator.cache import cache_folder
from orchestrator.cli.options import qbench_command, read_options, run_command, takes_options
from orchestrator.cli.orchestrate import lay_out, list_precisions, open_nvml
from orchestrator.errors import BadInput
from orchestrator.execution.calibration import calibrate_cell, require_calibration
from orchestrator.execution.observation import Observation
from orchestrator.execution.worker_process import WorkerProcess
from orchestrator.hardware.nvml import Nvml
from orchestrator.planning.plan import Cell, choose_device
from orchestrator.precisions.catalog import choose, find_all_precisions
from orchestrator.precisions.installer import drop_environment, make_environment
from orchestrator.precisions.interpreter import lent_packages, worker_command, worker_environment
from orchestrator.report.frames import describe
from schemas.frames import AnyFrame, Done, Phase
from schemas.options import Options
from schemas.record import MemoryReading

Show = Callable[[AnyFrame, MemoryReading | None], str | bytes]


def main() -> None:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_command(work)


@qbench_command("qbench-worker")
@click.argument("name", metavar="PRECISION", required=False)
@takes_options(
    "model", "workers", "checkpoint", "calibration", "python", "device", "prompts", "decode", "prompt_tokens",
    "depth", "new_tokens", "batch_size", "warmup", "seed", "outliers", "budget", "timeout",
)  # fmt: skip
@click.option(
    "--list", "list_", is_flag=True, help="List the precisions, their packages, and which can run here."
)
@click.option(
    "--calibrate", is_flag=True, help="Only make the precision's calibrated weights; measure nothing."
)
@click.option(
    "--make-env",
    metavar="NAME",
    help="Create a separate environment for a precision, and use it from then on.",
)
@click.option("--drop-env", metavar="NAME", help="Remove a precision's separate environment.")
def work(
    name: str | None, list_: bool, calibrate: bool, make_env: str | None, drop_env: str | None, **given: Any
) -> int:
    """Run the worker of one PRECISION in the foreground, without a run folder. Exits 1 if it fails."""
    options = msgspec.structs.replace(read_options(given), precision=[name] if name else [])
    with ExitStack() as stack:
        nvml, _ = open_nvml(stack)
        if list_:
            list_precisions(options, nvml)
            return 0
        if drop_env is not None:
            click.echo(drop_environment(drop_env, cache_folder()))
        if make_env is not None:
            (precision,) = choose(find_all_precisions(options.workers), [make_env], "--make-env")
            device = choose_device(options.device, nvml.gpus() if nvml else [])
            click.echo(make_environment(precision, cache_folder(), device))
        if drop_env is not None or make_env is not None:
            return 0
        if name is None:
            known = ", ".join(find_all_precisions(options.workers))
            raise BadInput("PRECISION", "", "is missing", f"Name one of: {known}")
        if calibrate:
            require_calibration(name, find_all_precisions(options.workers), options)
        plan = lay_out(options, nvml)
        if plan.left_out:
            raise BadInput("PRECISION", name, plan.left_out[name], "See qbench-worker --list")
        if calibrate:
            return calibrate_cell(plan.cells[0], options.timeout)
        return follow(plan.cells, nvml, options)


def follow(cells: list[Cell], nvml: Nvml | None, options: Options) -> int:
    """Run one worker over its cells and print its frames as they come; 0 if it got to the end of each."""
    first = cells[0]
    jobs = [msgspec.structs.replace(cell.job, budget_s=options.budget) for cell in cells]
    show = describe if sys.stdout.isatty() else _raw
    if first.job.model.notice:
        click.echo(first.job.model.notice, err=True)
    with lent_packages([first.precision]) as lent:
        command = worker_command(first.interpreter, first.precision.module)
        environment = worker_environment(first.interpreter, lent)
        with (
            Observation(first.job.device, nvml) as seen,
            WorkerProcess(command, environment, jobs[0], log=None) as worker,
        ):
            seen.watch_resident_set(worker.pid)
            done = _follow_cell(worker, seen, options.timeout, show)
            for job in jobs[1:]:
                if not worker.waits_for_more():
                    return 1
                seen.begin_cell()
                worker.send(job)
                done &= _follow_cell(worker, seen, options.timeout, show)
    return 0 if done else 1


def _follow_cell(worker: WorkerProcess, seen: Observation, timeout_s: float, show: Show) -> bool:
    for frame in worker.frames(timeout_s):
        if frame is None:
            continue
        seen.take(frame)
        if isinstance(frame, Phase):
            worker.acknowledge()
        click.echo(show(frame, seen.edges[-1].reading if isinstance(frame, Phase) else None))
    return isinstance(seen.outcome, Done)


def _raw(frame: AnyFrame, reading: MemoryReading | None) -> bytes:
    return msgspec.json.encode(frame)
