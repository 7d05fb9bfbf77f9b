"""`qbench-report RUN`: print the summary of a run from its records."""

from pathlib import Path

import click

from orchestrator.cli.program import qbench_command, run_command
from orchestrator.records.store import read_run
from orchestrator.report.summary import as_csv, as_json, as_markdown, print_summary


def main() -> None:
    """Entry point of the console script."""
    run_command(report)


@qbench_command("qbench-report")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--format", "form", type=click.Choice(["table", "md", "csv", "json"]), default="table", show_default=True,
    help="Format of the summary.",
)  # fmt: skip
@click.option("--verbose", "-v", is_flag=True, help="With the table, print what actually ran.")
def report(run: Path, form: str, verbose: bool) -> int:
    """Print the summary of the run in folder RUN from its records."""
    measured = read_run(run)
    if form == "table":
        print_summary(measured, run, verbose)
    else:
        show = {"md": as_markdown, "csv": as_csv, "json": as_json}[form]
        click.echo(show(measured).rstrip("\n"))
    return 0
