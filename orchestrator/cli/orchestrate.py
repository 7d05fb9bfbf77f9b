"""`qbench-orchestrate`: measure precisions of one model, each in a fresh process, and print a table."""

import os
import shlex
import signal
import sys
from contextlib import ExitStack, chdir
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from orchestrator.cache import cache_folder
from orchestrator.cli.option_parser import read_options, takes_options, typed_options
from orchestrator.cli.plan_file import with_plan_file
from orchestrator.cli.program import INTERRUPTED, qbench_command, run_command
from orchestrator.errors import BadInput
from orchestrator.execution.progress import make_watcher
from orchestrator.execution.resume import check_machine, check_plan, is_complete, left_of, resumed_options
from orchestrator.execution.run import run_plan
from orchestrator.hardware.machine import describe_machine
from orchestrator.hardware.nvml import Nvml, NvmlUnavailable
from orchestrator.planning.estimate import estimate
from orchestrator.planning.models import resolve_model
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.precisions.catalog import find_all_precisions
from orchestrator.precisions.environments import outdated_line
from orchestrator.records.store import RUNS_FOLDER, RunFolder, read_run, read_runs
from orchestrator.report.listing import print_plan, print_precisions
from orchestrator.report.summary import as_json, print_summary
from schemas.environment import Environment
from schemas.frames import Failed
from schemas.job import ModelSource
from schemas.options import Options
from schemas.record import Run, RunPlan


def main() -> None:
    """Entry point of the console script."""
    # So that SIGTERM stops the workers as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_command(orchestrate)


@qbench_command("qbench-orchestrate")
@takes_options()
@click.option("--json", "json_", is_flag=True, help="Print the summary as JSON instead of a table.")
@click.option("--verbose", "-v", is_flag=True, help="Print what actually ran: modules, settings, kernels.")
@click.option("--list", "list_", is_flag=True, help="List the precisions and whether each can run here.")
@click.option(
    "--dry-run", is_flag=True, help="Print what would be measured and about how long it takes, then exit."
)
@click.option(
    "--plan", "plan_file", metavar="FILE",
    help="TOML file of options, named as here without the dashes. The command line overrides it.",
)  # fmt: skip
@click.option(
    "--resume", "run_folder", metavar="RUN", type=click.Path(path_type=Path),
    help="Continue the interrupted run in this folder, with its options; finished rows are kept.",
)  # fmt: skip
def orchestrate(
    json_: bool,
    verbose: bool,
    list_: bool,
    dry_run: bool,
    plan_file: str | None,
    run_folder: Path | None,
    **given: Any,
) -> int:
    """Measure what each precision of a model costs and buys, each in a fresh process.

    Prints a table of speed (prefill and decode separately) and memory (torch and NVML), and keeps the raw
    measurements in a run folder. Exits 1 if a precision failed.
    """
    if run_folder is not None:
        if plan_file is not None:
            problem = "can't be combined with --resume"
            raise BadInput("--plan", plan_file, problem, "Omit it: the run keeps its options")
        return resume(run_folder, read_options(given), json_, verbose, dry_run)
    with ExitStack() as stack:
        options = stack.enter_context(with_plan_file(plan_file, read_options(given)))
        nvml, gpu_reason = open_nvml(stack)
        if list_:
            list_precisions(options, nvml)
            return 0
        plan = build_plan(options, nvml)
        machine = describe_machine(nvml, gpu_reason)
        if dry_run:
            print_dry_run(plan, machine)
            return 0
        folder, begun = start_run(options, plan, machine)
        ended = measure(plan, begun, folder, nvml)
    return conclude(folder.path, json_, verbose, ended)


def resume(path: Path, given: Options, json_: bool, verbose: bool, dry_run: bool) -> int:
    """Measure what is left of a run, in the folder where it was started. Raises `BadInput`."""
    begun = read_run(path, samples=False)
    options = resumed_options(begun.plan.options, given, typed_options())
    if is_complete(begun):
        click.echo(f"{path} is complete: nothing is left to measure", err=True)
        return conclude(path, json_, verbose)
    with ExitStack() as stack:
        nvml, gpu_reason = open_nvml(stack)
        machine = describe_machine(nvml, gpu_reason)
        folder = RunFolder.reopen(path.absolute())
        check_machine(folder.path, begun, machine)
        stack.enter_context(chdir(begun.plan.cwd or "."))
        plan = build_plan(options, nvml)
        check_plan(folder.path, begun, plan)
        left = left_of(plan, begun.cells)
        if dry_run:
            print_dry_run(left, machine)
            return 0
        ended = measure(left, begun, folder, nvml)
    return conclude(path, json_, verbose, ended)


def print_dry_run(plan: Plan, machine: Environment) -> None:
    """Print what would be measured, and about how long it would take, based on earlier runs."""
    print_plan(plan, estimate(plan, machine, read_runs(RUNS_FOLDER)))


def open_nvml(stack: ExitStack) -> tuple[Nvml | None, str | None]:
    """NVML while `stack` is open, or why it is unavailable."""
    try:
        return stack.enter_context(Nvml.open()), None
    except NvmlUnavailable as error:
        return None, str(error)


def list_precisions(options: Options, nvml: Nvml | None) -> None:
    """Print the precisions, and which of them can run here."""
    precisions = find_all_precisions(options.workers)
    print_precisions(precisions, options, nvml.gpus() if nvml else [], cache_folder())


def build_plan(options: Options, nvml: Nvml | None) -> Plan:
    """Plan these options on this machine; prints a line for each outdated environment that it ignores."""

    def find_model() -> ModelSource:
        say = partial(click.echo, err=True)
        return resolve_model(options.model, cache_folder(), say, options.outliers)

    precisions = find_all_precisions(options.workers)
    plan = make_plan(options, precisions, find_model, nvml.gpus() if nvml else [], cache_folder())
    for name in dict.fromkeys(cell.precision.name for cell in plan.cells if cell.interpreter.own):
        if line := outdated_line(precisions[name], cache_folder()):
            click.echo(line, err=True)
    return plan


def start_run(options: Options, plan: Plan, machine: Environment) -> tuple[RunFolder, Run]:
    """Create the run folder, with the plan and the machine in it. Returns it and the run without records."""
    now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    path = Path(options.out or RUNS_FOLDER / f"{now}-{plan.cells[0].job.model.name}")
    record = RunPlan(
        command=["qbench-orchestrate", *sys.argv[1:]],
        options=options,
        jobs=[cell.job for cell in plan.runnable],
        skipped=plan.skipped,
        cwd=os.getcwd(),
    )
    return RunFolder.create(path, record, machine), Run(plan=record, environment=machine, cells=[])


def measure(left: Plan, begun: Run, folder: RunFolder, nvml: Nvml | None) -> bool:
    """Run what is left of a run; False if that was interrupted."""
    messages = Console(stderr=True, highlight=False, markup=False)
    for name, why in left.skipped.items():
        messages.print(f"skipped {name}: {why}", soft_wrap=True)
    jobs = begun.plan.jobs
    watcher = make_watcher(messages, jobs, begun=len(jobs) - len(left.runnable))
    try:
        with folder.reserved():
            run_plan(left, begun, folder, watcher, nvml)
    except KeyboardInterrupt:
        return False
    return True


def conclude(path: Path, json_: bool, verbose: bool, ended: bool = True) -> int:
    """Print the summary of a run, and return the exit status."""
    run = read_run(path)
    click.echo(as_json(run)) if json_ else print_summary(run, path, verbose)
    if not ended:
        click.echo(
            f"interrupted; to continue: qbench-orchestrate --resume {shlex.quote(str(path))}", err=True
        )
        return INTERRUPTED
    return exit_status(run)


def exit_status(run: Run) -> int:
    """1 if a requested measurement failed. Not every precision supports every default decode mode."""
    options = run.plan.options
    default_modes = options.decode is None and all(sweep.decode is None for sweep in options.workloads)
    for cell in run.cells:
        if isinstance(cell.outcome, Failed):
            mode_may_fail = cell.job is not None and cell.job.workload.decode != "eager"
            if not (default_modes and mode_may_fail and cell.outcome.kind == "unsupported"):
                return 1
    return 0
