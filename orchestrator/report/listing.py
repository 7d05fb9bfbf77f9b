"""What there is to measure: the list of precisions, and the plan of a run not yet made."""

from collections.abc import Mapping

import click
from rich.box import SIMPLE_HEAD
from rich.table import Table

from orchestrator.names import job_name
from orchestrator.plan import Plan, check, choose_device, choose_interpreters
from orchestrator.precisions import Precision
from orchestrator.report.console import open_console
from orchestrator.units import duration
from schemas.environment import Gpu
from schemas.job import Workload
from schemas.options import Options


def print_precisions(precisions: Mapping[str, Precision], options: Options, gpus: list[Gpu]) -> None:
    """Every precision, what it stores, and whether it can run here."""
    device = choose_device(options.device, gpus)
    interpreters = choose_interpreters(options.python, precisions)
    table = Table(box=SIMPLE_HEAD, title=f"precisions, on {device}", title_justify="left", title_style="bold")
    for heading in ("precision", "bits", "here", "needs", "what it is"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "precision")
    for precision in precisions.values():
        why = check(precision, device, gpus, interpreters[precision.name])
        table.add_row(
            precision.name,
            f"{precision.bits_per_weight:g}",
            "yes" if why is None else f"no: {why}",
            ", ".join(precision.requirements),
            precision.summary,
        )
    open_console().print(table)


def print_plan(plan: Plan) -> None:
    """The cells of a plan in the order they would run, and what is left out."""
    if notice := plan.cells[0].job.model.notice:
        click.echo(notice)
    for cell in plan.cells:
        job, load = cell.job, cell.job.workload
        if cell.why_not is None:
            click.echo(
                f"{job_name(job)}: {job.model.name} on {job.device}, {len(load.prompts)} prompts"
                f"{_lengths(load)} × {load.new_tokens} new tokens, batch {load.batch_size}, "
                f"under {cell.interpreter.path}"
            )
        else:
            click.echo(f"{job.precision}: left out, {cell.why_not}")
    if plan.budget_s is not None:
        click.echo(f"budget: {duration(plan.budget_s)}")


def _lengths(load: Workload) -> str:
    prompt = f" of {load.prompt_tokens:,} tokens" if load.prompt_tokens else ""
    return prompt + (f" after {load.depth:,} of context" if load.depth else "")
