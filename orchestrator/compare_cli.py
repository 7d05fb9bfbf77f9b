"""`qbench-compare A B`: whether a second run differs from a first, beyond the noise; a gate for CI."""

from pathlib import Path

import click
import msgspec

from orchestrator.command_line import run_command
from orchestrator.compare import Limit, RunComparison, compare_runs, parse_limit
from orchestrator.gpu_speedups import GpuSpeedups, gpu_speedups
from orchestrator.report.compare_table import interval, print_comparison, print_gpus
from orchestrator.store import read_run


def main() -> None:
    """Entry point of the console script."""
    run_command(compare)


class Comparisons(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` prints: each later run over the first, and what each GPU wins."""

    runs: dict[str, RunComparison]
    gpus: list[GpuSpeedups]


@click.command("qbench-compare")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="A B…")
@click.option(
    "--fail-if", "limits", multiple=True, metavar="LIMIT",
    help="Exit 1 where this holds beyond the noise, e.g. 'decode<0.95' or 'loaded>1.01'; repeatable.",
)  # fmt: skip
@click.option("--json", "json_", is_flag=True, help="Print the comparison as JSON instead of tables.")
def compare(runs: tuple[Path, ...], limits: tuple[str, ...], json_: bool) -> int:
    """Hold the run folders B… against A: what was measured in both, ratios, and whether they differ.

    With runs of several GPUs, also what each precision wins on each. Exits 1 where a limit is broken.
    """
    parsed = [parse_limit(text) for text in limits]
    first, *others = [read_run(path) for path in runs]
    found = {str(path): compare_runs(first, other) for path, other in zip(runs[1:], others, strict=True)}
    gpus = gpu_speedups([first, *others])
    if json_:
        told = Comparisons(runs=found, gpus=gpus)
        click.echo(msgspec.json.format(msgspec.json.encode(told)).decode())
    else:
        for path, each in found.items():
            print_comparison(each, (runs[0].name, Path(path).name))
        if gpus and (not found or len({row.gpu for row in gpus}) > 1):
            print_gpus(gpus)
    return max((_check(each, parsed) for each in found.values()), default=0)


def _check(found: RunComparison, limits: list[Limit]) -> int:
    """1 where a limit is broken; what is broken, and what one round can't tell, goes to stderr."""
    status = 0
    for limit in limits:
        for pair in found.pairs:
            name = f"{pair.precision} {pair.decode}: {pair.figure} {interval(pair.comparison)}"
            if limit.is_broken(pair):
                click.echo(f"{name} breaks {limit.text}", err=True)
                status = 1
            elif limit.is_open(pair):
                click.echo(f"{name} may break {limit.text}: one round can't tell (--rounds 7)", err=True)
    return status
