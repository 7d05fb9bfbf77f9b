"""How long the parent takes to plan, read, summarize and compare a run of many cells.

    python benchmarks/parent_speed.py [CELLS]

Prints CPU seconds, the best of three, for 10,000 cells by default: first in a single round with many
workloads, then in 25 rounds with few. The cells are made up from a recorded one. The last figure is the
history of 200 copies of a recorded run.
"""

import gc
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from unittest.mock import patch

from msgspec.structs import replace

from orchestrator.analysis.comparison.compare import compare_runs
from orchestrator.analysis.comparison.history import Wanted, history
from orchestrator.analysis.comparison.measured_run import measure_run
from orchestrator.analysis.run_analysis import analyze_run
from orchestrator.execution.resume import check_plan, left_of
from orchestrator.planning.estimate import estimate
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.precisions.catalog import find_precisions
from orchestrator.records.store import RunFolder, read_run
from orchestrator.report.notes import notes
from schemas.job import Job
from schemas.options import Options
from schemas.record import CellRecord, MemoryReading, Run

TEMPLATE = Path(__file__).parent.parent / "results" / "h100-modes" / "7b"
SPEEDS = {"fp16": 100.0, "fp32": 50.0, "bf16": 100.0, "int8": 30.0, "nf4": 120.0}
ROUNDS = 25
BATCH_SIZES = [1, 2, 4, 8]
REPEATS = 3
RUNS_IN_HISTORY = 200

T = TypeVar("T")


def timed(name: str, task: Callable[[], T]) -> T:
    """The result of a task; prints the CPU seconds of the fastest of three attempts."""
    took_s = []
    for _ in range(REPEATS):
        gc.collect()
        start_s = time.process_time()
        result = task()
        took_s.append(time.process_time() - start_s)
    print(f"  {name:34} {min(took_s):7.3f} s", flush=True)
    return result


def shapes(cells: int) -> dict[str, dict[str, Any]]:
    """Options that give about this many cells."""
    lengths = cells // len(SPEEDS) // len(BATCH_SIZES)
    return {
        "one round": {"prompt_tokens": list(range(100, 100 + lengths))},
        f"{ROUNDS} rounds": {"prompt_tokens": list(range(100, 100 + lengths // ROUNDS)), "rounds": ROUNDS},
    }


def plan_of(template: Run, shape: dict[str, Any]) -> Plan:
    """A plan of all precisions, as `qbench-orchestrate` would build it on the template's machine."""
    model = template.plan.jobs[0].model
    options = Options(precision=list(SPEEDS), batch_size=BATCH_SIZES, decode=["eager"], **shape)
    return make_plan(options, find_precisions(), lambda: model, template.environment.gpus, Path("cache"))


def made_up(template: Run, plan: Plan, factor: float = 1.0) -> Run:
    """A run of this plan, with speeds that vary by 1 %."""
    draw = random.Random(0)
    readings = [MemoryReading(at_ns=at) for at in range(20)]

    def cell(job: Job) -> CellRecord:
        token_s = 1 / (factor * SPEEDS[job.precision] * draw.uniform(0.99, 1.01))
        trial = replace(template.cells[0].trials[0], decode_s=4 * token_s, token_s=[token_s] * 4)
        return replace(
            template.cells[0], precision=job.precision, job=job, trials=[trial], ready=None, samples=readings
        )

    jobs = [each.job for each in plan.cells]
    run_plan = replace(template.plan, jobs=jobs, skipped={})
    return replace(template, plan=run_plan, cells=[cell(job) for job in jobs])


def write(run: Run, path: Path) -> Path:
    """The run on disk, without the fsync after each cell, which would take minutes."""
    with patch.object(os, "fsync"):
        folder = RunFolder.create(path, run.plan, run.environment)
        for cell in run.cells:
            folder.append(cell)
    return path


def measure(template: Run, shape: dict[str, Any], scratch: Path) -> None:
    """Print the times of one shape of run."""
    plan = timed("build the plan", lambda: plan_of(template, shape))
    run = made_up(template, plan)
    fresh = (scratch / f"new{number}" for number in range(REPEATS))
    timed("create the run folder", lambda: RunFolder.create(next(fresh), run.plan, run.environment))
    folder = write(run, scratch / "run")
    timed("read without samples", lambda: read_run(folder, samples=False))
    timed("read with samples", lambda: read_run(folder))
    half = replace(run, cells=run.cells[: len(run.cells) // 2])
    timed("check the plan to resume", lambda: check_plan(folder, half, plan))
    timed("find what is left to measure", lambda: left_of(plan, half.cells))
    timed("estimate the time", lambda: estimate(plan, run.environment, [run]))
    analysis = timed("summarize", lambda: analyze_run(run))
    timed("explain", lambda: notes(analysis))
    other = made_up(template, plan, factor=1.1)
    timed("compare with a like run", lambda: compare_runs(measure_run(run), measure_run(other)))
    unlike = replace(other, cells=list(renamed(other.cells)))
    timed("compare with an unlike run", lambda: compare_runs(measure_run(run), measure_run(unlike)))


def renamed(cells: list[CellRecord]) -> Iterator[CellRecord]:
    """Cells of another model and another count of new tokens, so that none has a counterpart."""
    for cell in cells:
        if cell.job is not None:
            model, workload = replace(cell.job.model, name="other"), replace(cell.job.workload, new_tokens=9)
            yield replace(cell, job=replace(cell.job, model=model, workload=workload))


def copies(folder: Path) -> Path:
    """Many runs in a folder, all of them links to one."""
    for number in range(RUNS_IN_HISTORY):
        run = folder / f"run{number}"
        run.mkdir(parents=True)
        for file in TEMPLATE.glob("*.*"):
            (run / file.name).symlink_to(file.resolve())
    return folder


if __name__ == "__main__":
    cells = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    template = read_run(TEMPLATE, samples=False)
    for name, shape in shapes(cells).items():
        print(f"{cells:,} cells, {name}")
        with TemporaryDirectory() as scratch:
            measure(template, shape, Path(scratch))
    print(f"{RUNS_IN_HISTORY} runs of {len(template.cells)} cells")
    with TemporaryDirectory() as scratch:
        runs = copies(Path(scratch))
        timed("history", lambda: history(runs, Wanted()))
