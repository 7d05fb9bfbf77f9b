"""The work of planning, resuming, reading, summarizing and comparing grows in proportion to the cells.

Work is counted, not timed: calls of functions, in Python and in C, and comparisons of precision names, by
which cells are looked up. Quadratic work would quadruple when cells double. `benchmarks/parent_speed.py`
prints how long each step takes.
"""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from analyses import comparison_of
from call_counts import count_calls
from msgspec.structs import replace
from plans import plan_of
from sample_records import H100, make_cell, make_run, make_trial, sample

from orchestrator.analysis.run_analysis import analyze_run
from orchestrator.execution.resume import check_plan, is_complete, left_of
from orchestrator.planning.estimate import estimate
from orchestrator.planning.plan import Plan
from orchestrator.records.keys import key_of
from orchestrator.records.store import RunFolder, read_run
from orchestrator.report.notes import notes
from schemas.job import Job
from schemas.record import CellRecord, Run

SPEEDS = {"fp16": 100.0, "fp32": 50.0, "bf16": 100.0, "int8": 30.0, "nf4": 120.0}
MOST_GROWTH = 2.5
"""Allowed ratio of work for twice the cells: sorting adds a little to 2."""


class Counted(str):
    """A precision's name that counts how often it is compared or hashed."""

    times = 0

    def __eq__(self, other: object) -> bool:
        Counted.times += 1
        return str.__eq__(self, other) is True

    def __hash__(self) -> int:
        Counted.times += 1
        return str.__hash__(self)


def counted_jobs(plan: Plan) -> list[Job]:
    """The plan's jobs with counted names, no two the same object, which Python would find uncompared."""
    return [replace(cell.job, precision=Counted(cell.job.precision)) for cell in plan.cells]


def work_of(task: Callable[[], Any]) -> int:
    Counted.times = 0
    return count_calls(task) + Counted.times


def measured(jobs: list[Job], factor: float = 1.0) -> Run:
    """A run of these jobs in which speeds vary by 1 %."""
    draw = random.Random(0)

    def cell(job: Job) -> CellRecord:
        tok_s = factor * SPEEDS[str(job.precision)] * draw.uniform(0.99, 1.01)
        trial = make_trial(decode_s=4 / tok_s, token_s=[1 / tok_s] * 4)
        return make_cell(job.precision, job=job, trials=[trial], ready=None)

    run = make_run(*map(cell, jobs))
    return replace(run, plan=replace(run.plan, jobs=jobs))


class Size:
    """A plan with these options and what follows from it, in memory and on disk."""

    def __init__(self, options: dict[str, Any], folder: Path) -> None:
        self.options = options
        self.plan = self.make_plan()
        self.jobs = counted_jobs(self.plan)
        self.run = measured(self.jobs)
        self.folder = folder

    def make_plan(self) -> Plan:
        return plan_of([H100], precision=list(SPEEDS), **self.options)

    def write(self) -> Path:
        """The run on disk, without the fsync after each cell, which would take minutes."""
        run = measured([cell.job for cell in self.plan.cells])
        path = RunFolder.create(self.folder, run.plan, run.environment).path
        encoded = [msgspec.json.encode(cell) for cell in run.cells]
        (path / "records.jsonl").write_bytes(b"".join(line + b"\n" for line in encoded))
        samples = b"".join(msgspec.json.encode(sample(at)) + b"\n" for at in range(20))
        for job in run.plan.jobs:
            (path / "samples" / f"{key_of(job).stem}.jsonl").write_bytes(samples)
        return path


@pytest.fixture(scope="module", params=["one round", "rounds"])
def sizes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Size, Size]:
    """The second has twice the cells of the first: workloads in one round, or rounds of few workloads."""
    folder = tmp_path_factory.mktemp("scale")
    options: list[dict[str, Any]] = [
        {"prompt_tokens": list(range(100, 100 + 50 * times))}
        if request.param == "one round"
        else {"batch_size": [1, 2], "rounds": 20 * times}
        for times in (1, 2)
    ]
    small, large = (Size(each, folder / str(index)) for index, each in enumerate(options))
    assert len(large.plan.cells) == 2 * len(small.plan.cells) >= 400
    return small, large


def assert_in_proportion(sizes: tuple[Size, Size], task: Callable[[Size], Any]) -> None:
    task(sizes[0])  # imports and caches
    small, large = (work_of(partial(task, size)) for size in sizes)
    assert small <= large < MOST_GROWTH * small


def test_quadratic_work_is_noticed(sizes: tuple[Size, Size]) -> None:
    def search_a_list(size: Size) -> None:
        names = [Counted(f"{job.precision} {index}") for index, job in enumerate(size.jobs)]
        assert all(Counted(name + "") in names for name in names)

    with pytest.raises(AssertionError):
        assert_in_proportion(sizes, search_a_list)


def test_planning(sizes: tuple[Size, Size]) -> None:
    assert_in_proportion(sizes, Size.make_plan)


def test_finding_the_remaining_cells(sizes: tuple[Size, Size]) -> None:
    def find_remaining(size: Size) -> None:
        begun = replace(size.run, cells=size.run.cells[: len(size.jobs) // 2])
        assert is_complete(size.run)
        check_plan(size.folder, begun, size.plan)
        assert left_of(size.plan, begun.cells).cells == size.plan.cells[len(size.jobs) // 2 :]

    assert_in_proportion(sizes, find_remaining)


def test_estimating_the_time(sizes: tuple[Size, Size]) -> None:
    def estimate_time(size: Size) -> None:
        found = estimate(size.plan, size.run.environment, [size.run])
        assert (found.known, found.cells, found.unknown) == (len(size.jobs), len(size.jobs), [])

    assert_in_proportion(sizes, estimate_time)


def test_reading(sizes: tuple[Size, Size]) -> None:
    for size in sizes:
        size.write()
        assert {len(cell.samples) for cell in read_run(size.folder).cells} == {20}
    assert_in_proportion(sizes, lambda size: read_run(size.folder))
    assert_in_proportion(sizes, lambda size: RunFolder(size.folder).repair(len(size.jobs), []))


def test_summarizing(sizes: tuple[Size, Size]) -> None:
    def summarize(size: Size) -> None:
        analysis = analyze_run(size.run)
        rows = analysis.rows
        assert len(analysis.comparisons) == len(rows) * 4 / 5
        assert rows[-1].decode_versus_baseline == pytest.approx(SPEEDS[rows[-1].precision] / 100, rel=0.03)
        assert notes(analysis)

    assert_in_proportion(sizes, summarize)


def test_comparing(sizes: tuple[Size, Size]) -> None:
    def compare(size: Size) -> None:
        found = comparison_of(size.run, measured(size.jobs, factor=1.1))
        decode = [pair.comparison.ratio for pair in found.pairs if pair.figure == "decode"]
        assert decode == pytest.approx([1.1] * len(decode), rel=0.03)

    assert_in_proportion(sizes, compare)


def test_comparing_runs_without_common_cells(sizes: tuple[Size, Size]) -> None:
    """Every cell differs from its nearest one in two settings."""

    def compare(size: Size) -> None:
        jobs = [
            replace(job, model=replace(job.model, name="other"), workload=replace(job.workload, new_tokens=9))
            for job in size.jobs
        ]
        assert comparison_of(size.run, measured(jobs)).pairs == []

    assert_in_proportion(sizes, compare)
