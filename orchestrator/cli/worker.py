"""`qbench-worker`: run one worker in the foreground, to see its frames and find out why it fails.

On a terminal, frames are shown in readable form, with NVML's figures at each phase edge. Into a pipe they are
written as the JSON Lines that a run would read. The worker's stderr is passed through.
"""

import signal
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import click
import msgspec

from orchestrator.cache import cache_folder
from orchestrator.cli.option_parser import read_options, takes_options
from orchestrator.cli.orchestrate import build_plan, list_precisions, open_nvml
from orchestrator.cli.program import qbench_command, run_command
from orchestrator.errors import BadInput
from orchestrator.execution.calibration import calibrate_cell, require_calibration
from orchestrator.execution.worker_session import Event, WorkerSession, separate_start
from orchestrator.hardware.nvml import Nvml
from orchestrator.planning.plan import Cell, choose_device
from orchestrator.precisions.catalog import choose, find_all_precisions
from orchestrator.precisions.make_environment import drop_environment, make_environment
from orchestrator.report.frame_lines import describe
from schemas.frames import AnyFrame, Done
from schemas.options import Options
from schemas.record import MemoryReading


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
        plan = build_plan(options, nvml)
        if plan.skipped:
            raise BadInput("PRECISION", name, plan.skipped[name], "See qbench-worker --list")
        if calibrate:
            return calibrate_cell(plan.cells[0], options.timeout)
        return follow(plan.cells, nvml, options)


def follow(cells: list[Cell], nvml: Nvml | None, options: Options) -> int:
    """Run one worker over its cells and print its frames as they come. Returns 0 if all are done."""
    if notice := cells[0].job.model.notice:
        click.echo(notice, err=True)
    done = True
    with (
        separate_start(cells[0]) as start,
        WorkerSession(start, options.timeout, nvml) as session,
    ):
        for cell in cells:
            if session.is_started and not session.waits_for_more():
                return 1
            _print_events(session.events(msgspec.structs.replace(cell.job, budget_s=options.budget)))
            done &= isinstance(session.seen.outcome, Done)
    return 0 if done else 1


def _print_events(events: Iterable[Event]) -> None:
    show = describe if sys.stdout.isatty() else _raw
    for frame, memory in events:
        if frame is not None:
            click.echo(show(frame, memory))


def _raw(frame: AnyFrame, reading: MemoryReading | None) -> bytes:
    return msgspec.json.encode(frame)
