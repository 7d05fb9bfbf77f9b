"""A plan of 10,000 cells is laid out, resumed, read, summarized and compared, each in under two seconds.

What grows with the square of the cells would take minutes.
"""

import gc
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from msgspec.structs import replace
from plans import plan_of
from sample_records import H100, make_cell, make_run, make_trial, sample

from orchestrator.analysis.comparison.compare import compare_runs
from orchestrator.analysis.rounds import typical_run
from orchestrator.analysis.run_analysis import analyze_run
from orchestrator.execution.resume import check_plan, is_complete, left_of
from orchestrator.planning.estimate import estimate
from orchestrator.planning.plan import Plan
from orchestrator.records.keys import key_of
from orchestrator.records.store import RunFolder, read_run
from orchestrator.report.notes import notes
from schemas.job import Job
from schemas.record import CellRecord, Run

CELLS = 10_000
LIMIT_S = 2.0
SPEEDS = {"fp16": 100.0, "fp32": 50.0, "bf16": 100.0, "int8": 30.0, "nf4": 120.0}
SHAPES: dict[str, dict[str, Any]] = {
    "one round": {"batch_size": list(range(1, 11)), "prompt_tokens": list(range(100, 200))},
    "rounds": {"batch_size": [1, 2, 4, 8], "prompt_tokens": list(range(100, 110)), "rounds": 25},
}

T = TypeVar("T")


def timely(work: Callable[[], T]) -> T:
    """What `work` returns. CPU time is what counts, and the best of three: others use the machine too."""
    took_s = []
    for _ in range(3):
        gc.collect()
        gc.freeze()  # what this test alone keeps in memory is not looked through meanwhile
        start_s = time.process_time()
        result = work()
        took_s.append(time.process_time() - start_s)
        if took_s[-1] < LIMIT_S:
            return result
    pytest.fail(f"took {min(took_s):.1f} s")


def lay_out(shape: str) -> Plan:
    return plan_of([H100], precision=list(SPEEDS), **SHAPES[shape])


def measured(jobs: list[Job], factor: float = 1.0) -> Run:
    """A run of these jobs in which speeds vary by 1 %."""
    draw = random.Random(0)

    def cell(job: Job) -> CellRecord:
        tok_s = factor * SPEEDS[job.precision] * draw.uniform(0.99, 1.01)
        trial = make_trial(decode_s=4 / tok_s, token_s=[1 / tok_s] * 4)
        return make_cell(job.precision, job=job, trials=[trial], ready=None)

    run = make_run(*map(cell, jobs))
    return replace(run, plan=replace(run.plan, jobs=jobs))


@pytest.fixture(scope="module", params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def plan(shape: str) -> Plan:
    return lay_out(shape)


@pytest.fixture(scope="module")
def run(plan: Plan) -> Run:
    return measured([cell.job for cell in plan.cells])


@pytest.fixture(scope="module")
def folder(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on disk, written without the fsync after each cell, which would take minutes."""
    path = RunFolder.create(tmp_path_factory.mktemp("scale") / "run", run.plan, run.environment).path
    encoded = [msgspec.json.encode(cell) for cell in run.cells]
    (path / "records.jsonl").write_bytes(b"".join(line + b"\n" for line in encoded))
    samples = b"".join(msgspec.json.encode(sample(at)) + b"\n" for at in range(20))
    for job in run.plan.jobs:
        (path / "samples" / f"{key_of(job).stem}.jsonl").write_bytes(samples)
    return path


def test_planned(shape: str, tmp_path: Path) -> None:
    plan = timely(lambda: lay_out(shape))
    assert len(plan.runnable) == CELLS
    run = make_run(jobs=[cell.job for cell in plan.cells])
    kept = iter(range(3))
    timely(lambda: RunFolder.create(tmp_path / str(next(kept)), run.plan, run.environment))


def test_what_is_left_is_worked_out(plan: Plan, folder: Path) -> None:
    def work_out() -> Plan:
        run = read_run(folder, samples=False)
        assert is_complete(run)
        run = replace(run, cells=run.cells[: CELLS // 2])
        check_plan(folder, run, plan)
        return left_of(plan, run.cells)

    left = timely(work_out)
    assert left.cells == plan.cells[CELLS // 2 :]
    timely(lambda: RunFolder(folder).repair([]))


def test_its_time_is_told(plan: Plan, run: Run) -> None:
    told = timely(lambda: estimate(plan, run.environment, [run]))
    assert (told.known, told.cells, told.unknown) == (CELLS, CELLS, [])


def test_read_with_all_samples(folder: Path) -> None:
    run = timely(lambda: read_run(folder))
    assert {len(cell.samples) for cell in run.cells} == {20}


def test_summarized(run: Run) -> None:
    analysis = timely(lambda: analyze_run(run))
    rows = analysis.rows
    assert len(analysis.comparisons) == len(rows) * 4 / 5
    assert rows[-1].decode_versus_baseline == pytest.approx(SPEEDS[rows[-1].precision] / 100, rel=0.03)
    assert timely(lambda: notes(analysis))


def test_compared(run: Run) -> None:
    other = measured(run.plan.jobs, factor=1.1)
    found = timely(lambda: compare_runs(run, other))
    decode = [pair.comparison.ratio for pair in found.pairs if pair.figure == "decode"]
    assert len(decode) == len(typical_run(run).cells)
    assert decode == pytest.approx([1.1] * len(decode), rel=0.03)


def test_compared_with_what_has_no_counterpart(run: Run) -> None:
    """Every cell differs from its nearest in two things."""
    jobs = [
        replace(job, model=replace(job.model, name="other"), workload=replace(job.workload, new_tokens=9))
        for job in run.plan.jobs
    ]
    found = timely(lambda: compare_runs(run, measured(jobs)))
    assert found.pairs == []
    assert found.unmatched[0].endswith(" run has it with model other, new tokens 9, not tiny, 128")
