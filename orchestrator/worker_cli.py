"""`qbench-worker`: one worker in the foreground, to see what it says and where it stumbles.

On a terminal frames are shown readable, with what NVML saw at each phase edge; into a pipe go the very
JSON Lines that a run would read. The worker's stderr is the terminal's.
"""

import signal
import sys
from contextlib import ExitStack
from typing import Any

import click
import msgspec

from orchestrator.cli import lay_out, open_nvml
from orchestrator.command_line import read_options, run_command, takes_options
from orchestrator.errors import BadInput
from orchestrator.interpreter import lent_packages, worker_command, worker_environment
from orchestrator.nvml import Nvml
from orchestrator.plan import Cell
from orchestrator.precisions import find_precisions
from orchestrator.report.frames import describe
from orchestrator.report.listing import print_precisions
from orchestrator.run import Observation
from orchestrator.worker_process import WorkerProcess
from schemas.frames import Done, Phase


def main() -> None:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_command(work)


@click.command("qbench-worker")
@click.argument("name", metavar="PRECISION", required=False)
@takes_options(
    "model", "checkpoint", "python", "device", "prompts", "prompt_tokens", "new_tokens", "batch_size",
    "warmup", "seed", "budget", "timeout",
)  # fmt: skip
@click.option(
    "--list", "list_", is_flag=True, help="List the precisions, their packages, and which run here."
)
def work(name: str | None, list_: bool, **given: Any) -> int:
    """Run the worker of one PRECISION in the foreground, without a run folder. Exits 0, or 1 if it fails."""
    if name is not None:
        given["precision"] = [name]
    options = read_options(given)
    with ExitStack() as stack:
        nvml, _ = open_nvml(stack)
        if list_:
            print_precisions(find_precisions(), options, nvml.gpus() if nvml else [])
            return 0
        if name is None:
            raise BadInput("PRECISION", "", "is missing", "Name one of: " + ", ".join(find_precisions()))
        plan = lay_out(options, nvml)
        cell = plan.cells[0]
        if cell.why_not is not None:
            raise BadInput("PRECISION", name, cell.why_not, "See qbench-worker --list")
        job = msgspec.structs.replace(cell.job, budget_s=options.budget)
        return follow(cell._replace(job=job), nvml, options.timeout)


def follow(cell: Cell, nvml: Nvml | None, timeout_s: float) -> int:
    """Run a worker and print its frames as they come; 0 if it got to its end."""
    encoder = msgspec.json.Encoder()
    readable = sys.stdout.isatty()
    if cell.job.model.notice:
        click.echo(cell.job.model.notice, err=True)
    with lent_packages() as lent:
        command = worker_command(cell.interpreter, cell.precision.module)
        environment = worker_environment(cell.interpreter, lent)
        with (
            Observation(cell.job.device, nvml) as seen,
            WorkerProcess(command, environment, cell.job, log=None) as worker,
        ):
            seen.watch_resident_set(worker.pid)
            for frame in worker.frames(timeout_s):
                if frame is None:
                    continue
                seen.take(frame)
                if isinstance(frame, Phase):
                    worker.acknowledge()
                reading = seen.edges[-1].reading if isinstance(frame, Phase) else None
                click.echo(describe(frame, reading) if readable else encoder.encode(frame))
    return 0 if isinstance(seen.outcome, Done) else 1
