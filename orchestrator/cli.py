"""`qbench-orchestrate`: measure precisions of one model, each in a fresh process, and print the table."""

import signal
import sys
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from orchestrator.cache import cache_folder
from orchestrator.command_line import read_options, run_command, takes_options
from orchestrator.environments import outdated_line
from orchestrator.estimate import estimate
from orchestrator.machine import describe_machine
from orchestrator.models import resolve_model
from orchestrator.nvml import Nvml, NvmlUnavailable
from orchestrator.plan import Plan, make_plan
from orchestrator.plan_file import with_plan_file
from orchestrator.precisions import find_all_precisions
from orchestrator.progress import watcher
from orchestrator.report.listing import print_plan, print_precisions
from orchestrator.report.summary import as_json, print_summary
from orchestrator.run import run_plan
from orchestrator.store import RUNS_FOLDER, RunFolder, read_run, read_runs
from schemas.frames import Failed
from schemas.job import ModelSource
from schemas.options import Options
from schemas.record import Run, RunPlan


def main() -> None:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill ends workers as Ctrl-C does
    run_command(orchestrate)


@click.command("qbench-orchestrate")
@takes_options()
@click.option("--json", "json_", is_flag=True, help="Print the summary as JSON instead of a table.")
@click.option("--verbose", "-v", is_flag=True, help="Print what really ran: modules, settings, kernels.")
@click.option("--list", "list_", is_flag=True, help="List the precisions, and whether each can run here.")
@click.option("--dry-run", is_flag=True, help="Print what would be measured, and about how long, and stop.")
@click.option(
    "--plan",
    "plan_file",
    metavar="FILE",
    help="TOML file of options, each a key without its dashes. Options that are typed as well win over it.",
)
@click.version_option(package_name="qbench")
def orchestrate(
    json_: bool, verbose: bool, list_: bool, dry_run: bool, plan_file: str | None, **given: Any
) -> int:
    """Measure what each precision of a model costs and buys, each in a fresh process.

    Prints a table of speed (prefill and decode apart) and memory (torch and NVML), and keeps the raw
    facts in a run folder. Exits 0, or 1 where a precision failed.
    """
    with ExitStack() as stack:
        options = stack.enter_context(with_plan_file(plan_file, read_options(given)))
        nvml, gpu_reason = open_nvml(stack)
        if list_:
            list_precisions(options, nvml)
            return 0
        plan = lay_out(options, nvml)
        if dry_run:
            print_plan(plan, estimate(plan, describe_machine(nvml, gpu_reason), read_runs(RUNS_FOLDER)))
            return 0
        folder = start_run(options, plan, nvml, gpu_reason)
        messages = Console(stderr=True, highlight=False, markup=False)
        for name, why in plan.left_out.items():
            messages.print(f"left out {name}: {why}", soft_wrap=True)
        watching = watcher(messages, len(plan.runnable))
        interrupted = False
        try:
            run_plan(plan, folder, watching, nvml, options.timeout, explicit=not options.all)
        except KeyboardInterrupt:
            interrupted = True
    run = read_run(folder.path)
    click.echo(as_json(run)) if json_ else print_summary(run, folder.path, verbose)
    if interrupted:
        raise KeyboardInterrupt
    return exit_status(run)


def open_nvml(stack: ExitStack) -> tuple[Nvml | None, str | None]:
    """NVML for as long as `stack` is open, or why there is none."""
    try:
        return stack.enter_context(Nvml.open()), None
    except NvmlUnavailable as error:
        return None, str(error)


def list_precisions(options: Options, nvml: Nvml | None) -> None:
    """Print what there is to measure, and what would run here."""
    precisions = find_all_precisions(options.workers)
    print_precisions(precisions, options, nvml.gpus() if nvml else [], cache_folder())


def lay_out(options: Options, nvml: Nvml | None) -> Plan:
    """The plan of these options on this machine; environments that it passes over are told of."""

    def find_model() -> ModelSource:
        say = partial(click.echo, err=True)
        return resolve_model(options.model, cache_folder(), say, options.outliers)

    precisions = find_all_precisions(options.workers)
    plan = make_plan(options, precisions, find_model, nvml.gpus() if nvml else [], cache_folder())
    for name in dict.fromkeys(cell.precision.name for cell in plan.cells if cell.interpreter.own):
        if line := outdated_line(precisions[name], cache_folder()):
            click.echo(line, err=True)
    return plan


def start_run(options: Options, plan: Plan, nvml: Nvml | None, gpu_reason: str | None) -> RunFolder:
    """Make the run folder, with the plan and the machine in it."""
    now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    path = Path(options.out or RUNS_FOLDER / f"{now}-{plan.cells[0].job.model.name}")
    record = RunPlan(
        command=["qbench-orchestrate", *sys.argv[1:]],
        options=options,
        jobs=[cell.job for cell in plan.runnable],
        skipped=plan.left_out,
    )
    return RunFolder.create(path, record, describe_machine(nvml, gpu_reason))


def exit_status(run: Run) -> int:
    """1 where something that was asked for failed; not every precision can do every default decode mode."""
    options = run.plan.options
    default_modes = options.decode is None and all(sweep.decode is None for sweep in options.workloads)
    for cell in run.cells:
        if isinstance(cell.outcome, Failed):
            of_mode = cell.job is not None and cell.job.workload.decode != "eager"
            if not (default_modes and of_mode and cell.outcome.kind == "unsupported"):
                return 1
    return 0
