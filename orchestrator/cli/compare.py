"""`qbench-compare A B`: whether a second run differs from a first beyond noise; can gate CI.

`--history DIR` shows one figure over all runs in a folder instead.
"""

from pathlib import Path

import click
import msgspec

from orchestrator.analysis.comparison.compare import QUALITY, Pair, RunComparison, compare_runs
from orchestrator.analysis.comparison.gpu_speedups import GpuSpeedups, gpu_speedups
from orchestrator.analysis.comparison.history import HISTORY_FIGURES, Wanted, history
from orchestrator.analysis.comparison.limits import Limit, parse_limit
from orchestrator.analysis.comparison.measured_run import measure_run
from orchestrator.cli.program import qbench_command, run_command
from orchestrator.errors import BadInput
from orchestrator.records.store import ARCHIVED_RECORDS, RECORDS, read_records
from orchestrator.report.compare_table import interval, print_comparison, print_gpus
from orchestrator.report.history_table import print_history


def main() -> None:
    """Entry point of the console script."""
    run_command(compare)


class Comparisons(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` prints: each later run compared with the first, and each precision's gain on each GPU."""

    runs: dict[str, RunComparison]
    gpus: list[GpuSpeedups]


@qbench_command("qbench-compare")
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path), metavar="A B…")
@click.option(
    "--fail-if", "limits", multiple=True, metavar="LIMIT",
    help="Exit 1 if this holds beyond noise: 'decode<0.95', 'loaded>1.01', 'tokens<1'; repeatable.",
)  # fmt: skip
@click.option(
    "--history", "folder", type=click.Path(path_type=Path), metavar="DIR",
    help="Instead of A B…: show a figure over time, from all runs below this folder.",
)  # fmt: skip
@click.option(
    "--figure",
    type=click.Choice(HISTORY_FIGURES),
    help="With --history: the figure to show. Default: decode.",
)
@click.option("--model", "-m", metavar="NAME", help="With --history: only models whose name contains this.")
@click.option(
    "--precision", "-p", multiple=True, metavar="NAME",
    help="With --history: only this precision; repeatable.",
)  # fmt: skip
@click.option("--gpu", metavar="NAME", help="With --history: only GPUs whose name contains this.")
@click.option("--json", "json_", is_flag=True, help="Print JSON instead of tables.")
def compare(
    runs: tuple[Path, ...],
    limits: tuple[str, ...],
    folder: Path | None,
    figure: str | None,
    model: str | None,
    precision: tuple[str, ...],
    gpu: str | None,
    json_: bool,
) -> int:
    """Compare B… with A: ratios of what both measured, and whether they differ.

    Each is a run folder, or a file of records from another machine. With runs from several GPUs, also prints
    what each precision gains on each. Exits 1 if a limit is broken.
    """
    if folder is not None:
        if runs or limits:
            problem = "can't be combined with runs or --fail-if"
            raise BadInput("--history", str(folder), problem, "Omit one or the other")
        _show_history(folder, Wanted(figure or "decode", model or "", precision, gpu or ""), json_)
        return 0
    _refuse({"--figure": figure, "--model": model, "--precision": ", ".join(precision), "--gpu": gpu})
    if not runs:
        raise BadInput("A B…", "", "is missing", "Name run folders, or use --history DIR")
    return _compare(runs, [parse_limit(text) for text in limits], json_)


def _refuse(history_options: dict[str, str | None]) -> None:
    """Raise `BadInput` if an option was given that only works with `--history`."""
    for option, value in history_options.items():
        if value:
            raise BadInput(option, value, "only works with --history", "Add --history DIR")


def _show_history(folder: Path, wanted: Wanted, json_: bool) -> None:
    found = history(folder, wanted)
    if json_:
        _print_json(found)
        return
    print_history(found)
    for line in found.passed_over:
        click.echo(f"skipped: {line}", err=True)


def _compare(paths: tuple[Path, ...], limits: list[Limit], json_: bool) -> int:
    runs = {name: measure_run(read_records(path)) for name, path in zip(_names(paths), paths, strict=True)}
    first, *others = _names(paths)
    found = {other: compare_runs(runs[first], runs[other]) for other in others}
    gpus = gpu_speedups(runs)
    if json_:
        _print_json(Comparisons(runs=found, gpus=gpus))
    else:
        for other, each in found.items():
            print_comparison(each, (first, other))
        if gpus and (not found or len({row.gpu for row in gpus}) > 1):
            print_gpus(gpus)
    return max((_check(each, limits) for each in found.values()), default=0)


def _print_json(result: msgspec.Struct) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(result)).decode())


def _names(paths: tuple[Path, ...]) -> list[str]:
    """Column headings: the runs' folder names, even if a records file was named; if ambiguous, the paths."""
    whole = [path.resolve() for path in paths]
    names = [each.parent.name if each.name in (RECORDS, ARCHIVED_RECORDS) else each.name for each in whole]
    return names if len(set(names)) == len(set(whole)) else list(map(str, paths))


def _check(found: RunComparison, limits: list[Limit]) -> int:
    """1 if a limit is broken. Broken limits, and those left undecided by too few rounds, go to stderr."""
    status = 0
    for limit in limits:
        for pair in found.pairs:
            name = f"{pair.precision} {pair.decode}: {pair.figure} {interval(pair.comparison)}"
            if limit.is_broken(pair):
                click.echo(f"{name} breaks {limit.text}", err=True)
                status = 1
            elif limit.is_undecided(pair):
                click.echo(f"{name} may break {limit.text}: {_too_few(pair)}", err=True)
    return status


def _too_few(pair: Pair) -> str:
    few = pair.comparison.rounds
    if pair.figure == QUALITY:
        return f"{'one prompt' if few == 1 else f'{few} prompts'} can't tell"
    return f"{'one round' if few == 1 else f'{few} rounds'} can't tell (try --rounds 7)"
