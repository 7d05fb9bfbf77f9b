"""Listings before a run: the precisions, and the plan."""

from collections.abc import Mapping
from pathlib import Path

import click
from rich.box import SIMPLE_HEAD
from rich.table import Table

from orchestrator.analysis.verdicts import FEWEST_ROUNDS
from orchestrator.planning.estimate import Estimate
from orchestrator.planning.plan import Cell, Plan, choose_device, choose_interpreters, find_obstacle
from orchestrator.precisions.catalog import Precision
from orchestrator.precisions.environments import outdated_line
from orchestrator.precisions.interpreter import Interpreter
from orchestrator.records.keys import CellKey, key_of
from orchestrator.report.console import open_console
from orchestrator.units import duration
from schemas.environment import Gpu
from schemas.job import Workload
from schemas.options import Options


def print_precisions(
    precisions: Mapping[str, Precision], options: Options, gpus: list[Gpu], cache_folder: Path
) -> None:
    """Every precision, its format and environment; below the table, problems and their fixes."""
    device = choose_device(options.device, gpus)
    interpreters = choose_interpreters(options.python, precisions, cache_folder)
    table = Table(box=SIMPLE_HEAD, title=f"precisions, on {device}", title_justify="left", title_style="bold")
    for heading in ("precision", "bits", "here", "environment", "needs", "what it is"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "precision")
    # Below the table, not in its cells: commands to copy must not be wrapped.
    lines: list[str] = []
    for name, precision in precisions.items():
        why = find_obstacle(precision, device, gpus, interpreters[name])
        if why is not None:
            lines.append(f"{name}: {why}")
        if interpreters[name].own and (outdated := outdated_line(precision, cache_folder)):
            lines.append(outdated)
        table.add_row(
            name,
            f"{precision.bits_per_weight:g}",
            "yes" if why is None else "no",
            _environment(interpreters[name]),
            ", ".join(precision.requirements),
            precision.summary,
        )
    open_console().print(table)
    for line in lines:
        click.echo(line)


def _environment(interpreter: Interpreter) -> str:
    if interpreter.made:
        return "its own"
    return "qbench's" if interpreter.own else "--python"


def print_plan(plan: Plan, estimate: Estimate) -> None:
    """The cells, each once and in the order they would run, skipped cells, rounds, and the estimated time."""
    if notice := plan.cells[0].job.model.notice:
        click.echo(notice)
    # A resumed run has finished some rounds, and may be in the middle of one.
    distinct: dict[CellKey, Cell] = {}
    for cell in plan.cells:
        distinct.setdefault(key_of(cell.job).without_round, cell)
    for cell in distinct.values():
        job, load = cell.job, cell.job.workload
        if cell.why_not is None:
            click.echo(
                f"{key_of(job).name}: {job.model.name} on {job.device}, {len(load.prompts)} prompts"
                f"{_lengths(load)} × {load.new_tokens} new tokens, batch {load.batch_size}, "
                f"under {cell.interpreter.path}"
            )
        else:
            click.echo(f"{job.precision}: skipped, {cell.why_not}")
    click.echo(_count(plan, sum(cell.why_not is None for cell in distinct.values())))
    if plan.budget_s is not None:
        click.echo(f"budget: {duration(plan.budget_s)}")
    if plan.runnable:
        click.echo(f"time: {estimate}")


def _count(plan: Plan, cells: int) -> str:
    """The number of cells, and of rounds."""
    rounds = len({cell.job.round for cell in plan.cells})
    each = f"{cells} cells" if cells != 1 else "1 cell"
    if rounds == 1:
        return each
    if plan.precise:
        precise = f"until every ratio is known within {plan.precise:.1%}"
        return f"{each}, in {FEWEST_ROUNDS} to {rounds} rounds, {precise}; the time is for {FEWEST_ROUNDS}"
    return f"{each}, in {rounds} rounds, each in its own random order: {len(plan.runnable)} cells"


def _lengths(load: Workload) -> str:
    prompt = f" of {load.prompt_tokens:,} tokens" if load.prompt_tokens else ""
    return prompt + (f" after {load.depth:,} of context" if load.depth else "")
