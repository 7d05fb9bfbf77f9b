"""A figure over time: the same cell in many runs, in chronological order.

Runs are found by their records, in all folders below the given one. Each is compared with the previous run;
if both have several rounds, a change has an interval and, beyond the noise, a verdict.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median_low
from typing import NamedTuple

import msgspec

from orchestrator.analysis.comparison.compare import FIGURES, QUALITY
from orchestrator.analysis.comparison.measured_run import (
    CrossRunKey,
    Groups,
    distinctions,
    groups_of,
    qualities,
)
from orchestrator.analysis.intervals import Comparison, Sample, compare, of_shares, of_two
from orchestrator.analysis.metrics import measure_cell
from orchestrator.errors import BadInput
from orchestrator.records.keys import key_of
from orchestrator.records.store import find_records, read_records
from schemas.job import DecodeMode, ModelSource
from schemas.record import CellRecord, Run

HISTORY_FIGURES = (*FIGURES, QUALITY)


class Wanted(NamedTuple):
    """The figure to show, and for which cells; model and GPU by part of their names, ignoring case."""

    figure: str = "decode"
    model: str = ""
    precisions: tuple[str, ...] = ()
    gpu: str = ""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """A row: the figure in one run."""

    run: str
    """Its folder, relative to the searched one."""
    started_at: str | None
    """UTC, ISO 8601."""
    commit: str | None
    torch: str | None
    value: float
    """The median over rounds; for quality the mean over prompts."""
    change: Comparison | None
    """Relative to the previous run; None for the first run, and if there is no ratio."""


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """A table: the same cell over time."""

    gpu: str
    """The CPU if there was none."""
    model: str
    precision: str
    decode: DecodeMode
    workload: str
    """How it differs from others of this GPU and model; empty if there are none."""
    points: list[Point]


class History(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON output of `--history`."""

    figure: str
    series: list[Series]
    passed_over: list[str]
    """Why a run could not be read, a line each."""


class _SeriesKey(NamedTuple):
    """What one table shows."""

    gpu: str
    measured: CrossRunKey


class _Reading(NamedTuple):
    """What one run contributes to a table."""

    run: str
    started_at: str | None
    commit: str | None
    torch: str | None
    values: dict[int, float]
    """By round, or for quality by prompt."""


def history(folder: Path, wanted: Wanted) -> History:
    """A figure in all runs below `folder`. Raises `BadInput` if no run has it."""
    tables: dict[_SeriesKey, list[_Reading]] = {}
    seen: set[_SeriesKey] = set()
    passed_over: list[str] = []
    for name, run in _readable_runs(folder, wanted.figure, passed_over):
        groups = groups_of(run)
        for measured, cells in groups.items():
            key = _SeriesKey(_gpu(run, cells), measured)
            seen.add(key)
            if _is_wanted(key, cells, wanted) and (values := _values(measured, groups, wanted.figure)):
                tables.setdefault(key, []).append(_reading(name, run, cells, values))
    if not tables:
        raise BadInput(
            "--history", str(folder), f"has no such {wanted.figure} figure", _contents(seen, passed_over)
        )
    order = sorted(tables, key=lambda key: (key.gpu, key.measured.model))
    series = [_series(key, tables, wanted.figure) for key in order]
    return History(figure=wanted.figure, series=series, passed_over=passed_over)


def _readable_runs(folder: Path, figure: str, passed_over: list[str]) -> Iterator[tuple[str, Run]]:
    """Each run with its name; if it can't be read, the reason is added to `passed_over`."""
    for file in find_records(folder):
        try:
            # Only the peak of a resident set requires the samples.
            yield str(file.parent.relative_to(folder)), read_records(file, samples=figure == "peak")
        except BadInput as error:
            passed_over.append(str(error))


def _gpu(run: Run, cells: list[CellRecord]) -> str:
    names = {cell.ready.device_name for cell in cells if cell.ready}
    return run.environment.cpu if names == {"CPU"} else ", ".join(sorted(names))


def _is_wanted(key: _SeriesKey, cells: list[CellRecord], wanted: Wanted) -> bool:
    model = cells[0].job.model if cells[0].job else None
    return (
        model is not None
        and _names(wanted.model, model)
        and wanted.gpu.casefold() in key.gpu.casefold()
        and (not wanted.precisions or key.measured.cell.precision in wanted.precisions)
    )


def _names(part: str, model: ModelSource) -> bool:
    """Whether a user may refer to the model by this."""
    names = (model.name, model.location, f"{model.kind}:{model.location}")
    return any(part.casefold() in name.casefold() for name in names)


def _contents(seen: set[_SeriesKey], passed_over: list[str]) -> str:
    if not seen:
        other = "Name a folder that contains run folders of qbench-orchestrate"
        return next(iter(passed_over), other).removesuffix(".")
    has = (
        {key.measured.model for key in seen},
        {key.measured.cell.precision for key in seen},
        {key.gpu for key in seen} - {""},
    )
    models, precisions, gpus = (", ".join(sorted(names)) for names in has)
    return f"Its runs are of {models}, with {precisions}, on {gpus}; random weights have no quality"


def _values(measured: CrossRunKey, groups: Groups, figure: str) -> dict[int, float]:
    if figure == QUALITY:
        return qualities(measured, groups)
    found = {key_of(cell).round: getattr(measure_cell(cell), FIGURES[figure]) for cell in groups[measured]}
    return {at: value for at, value in found.items() if value}


def _reading(name: str, run: Run, cells: list[CellRecord], values: dict[int, float]) -> _Reading:
    torch = {cell.ready.versions["torch"] for cell in cells if cell.ready and "torch" in cell.ready.versions}
    return _Reading(
        run=name,
        started_at=min((cell.started_at for cell in cells if cell.started_at), default=None),
        commit=run.environment.commit,
        torch=", ".join(sorted(torch)) or None,
        values=values,
    )


def _series(key: _SeriesKey, tables: dict[_SeriesKey, list[_Reading]], figure: str) -> Series:
    gpu, measured = key
    others = [each.measured for each in tables if (each.gpu, each.measured.model) == (gpu, measured.model)]
    readings = sorted(tables[key], key=lambda reading: (reading.started_at or "", reading.run))
    return Series(
        gpu=gpu,
        model=measured.model,
        precision=measured.cell.precision,
        decode=measured.cell.decode,
        workload=distinctions(others)[measured],
        points=list(_points(readings, figure)),
    )


def _points(readings: list[_Reading], figure: str) -> Iterator[Point]:
    for before, now in pairwise([None, *readings]):
        assert now
        values = list(now.values.values())
        yield Point(
            run=now.run,
            started_at=now.started_at,
            commit=now.commit,
            torch=now.torch,
            value=fmean(values) if figure == QUALITY else median_low(values),
            change=_change(now.values, before.values, figure) if before else None,
        )


def _change(values: dict[int, float], before: dict[int, float], figure: str) -> Comparison | None:
    sample = _sample(values, before, figure)
    return sample and compare(sample)


def _sample(values: dict[int, float], before: dict[int, float], figure: str) -> Sample | None:
    if figure != QUALITY:
        return of_two(list(values.values()), list(before.values()))
    both = [prompt for prompt in values if prompt in before]
    return of_shares([values[at] for at in both], [before[at] for at in both]) if both else None
