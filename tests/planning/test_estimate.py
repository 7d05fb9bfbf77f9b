"""The time that a plan will take: from earlier runs where they tell, else no figure."""

from pathlib import Path
from typing import Any

import pytest
from conftest import Qbench
from msgspec.structs import replace
from plans import MODEL, plan_of
from sample_records import H100, T4, edge, make_cell, make_job, make_run, make_trial

from orchestrator.planning.estimate import Estimate, estimate
from orchestrator.planning.plan import Plan
from orchestrator.records.store import RunFolder
from schemas.frames import Failed, SetUp
from schemas.job import Workload
from schemas.options import Sweep
from schemas.record import CellRecord, PeaksRecord, Run

HERE = make_run().environment
PROMPTS = ["one"] * 20
SECOND = 10**9


def cell(precision: str = "fp16", came_later: bool = False, decode: Any = "eager", **load: Any) -> CellRecord:
    """20 prompts × 5 tokens: 7 s of start, 1 s of set-up, and 28 trials of 0.5 s, 8 of them untimed."""
    workload = Workload(prompts=PROMPTS, decode=decode, **({"new_tokens": 5} | load))
    began_s = 50 if came_later else 0
    return make_cell(
        precision,
        job=make_job(precision, workload=workload, model=MODEL),
        trials=[make_trial(index, new_tokens=workload.new_tokens) for index in range(20)],
        edges=[edge("start", 0), edge("setup", 7 * SECOND)],
        setup=SetUp(setup_s=1.0),
        began_ns=began_s * SECOND,
        wall_s=15.0 if came_later else 22.0,
    )


def plan(**options: Any) -> Plan:
    defaults: dict[str, Any] = {"decode": ["eager"], "new_tokens": 5}
    made = plan_of([H100], **(defaults | options))
    jobs = (each.job for each in made.cells)
    cells = [
        each._replace(job=replace(job, workload=replace(job.workload, prompts=PROMPTS)))
        for each, job in zip(made.cells, jobs, strict=True)
    ]
    return made._replace(cells=cells)


def told(plan: Plan, *runs: Run) -> Estimate:
    return estimate(plan, HERE, runs)


def test_the_same_again_takes_as_long_as_before() -> None:
    assert told(plan(), make_run(cell())).known_s == pytest.approx(22)
    assert str(told(plan(), make_run(cell()))) == "about 22 s, by earlier runs here"


def test_a_worker_starts_once_for_all_its_cells_and_anew_in_each_round() -> None:
    run = make_run(cell(), cell(new_tokens=10, came_later=True))
    alone = told(plan(), run).known_s - 7
    both = told(plan(new_tokens=[5, 10]), run)
    gap_s = 50 - 22
    assert both.known_s == pytest.approx(7 + 2 * (15 + gap_s))
    assert alone == pytest.approx(15 + gap_s)
    assert told(plan(rounds=3), run).known_s == pytest.approx(3 * (22 + gap_s))


@pytest.mark.parametrize(
    ("size", "trials", "trial_s"),
    [
        ({"new_tokens": 10}, 28, 0.1 + 0.8),
        ({"prompt_tokens": [40]}, 28, 0.4 + 0.4),
        ({"depth": [30]}, 28, 0.4 + 0.4),
        ({"batch_size": [4]}, 5 + 8, 0.4 + 0.4),
    ],
)
def test_other_sizes_are_scaled(size: dict[str, Any], trials: int, trial_s: float) -> None:
    assert told(plan(**size), make_run(cell())).known_s == pytest.approx(7 + 1 + trials * trial_s)


def test_the_nearest_size_tells_and_of_equals_the_median() -> None:
    slow = [replace(cell(new_tokens=5), wall_s=wall_s) for wall_s in (22.0, 32.0, 90.0)]
    runs = [make_run(each) for each in (*slow, replace(cell(new_tokens=200), wall_s=9000.0))]
    assert told(plan(), *runs).known_s == pytest.approx(32)


@pytest.mark.parametrize(
    "other",
    [
        make_run(cell("int8")),
        make_run(cell(decode="graph")),
        make_run(replace(cell(), outcome=Failed(kind="error", message="boom"))),
        make_run(replace(cell(), job=make_job(model=replace(MODEL, location="models/other")))),
        make_run(cell(prompt_tokens=512)),  # the plan's prompts are as long as they are
        replace(make_run(cell()), environment=replace(HERE, gpus=[T4])),
        replace(make_run(cell()), environment=replace(HERE, cpu="another")),
    ],
)
def test_what_was_not_measured_here_has_no_figure(other: Run) -> None:
    assert str(told(plan(), other)) == "unknown; no earlier figures of fp16 here"
    at_most = "at most about 1 min 30 s, by the budget; no earlier figures of fp16 here"
    assert str(told(plan(budget=90), other)) == at_most


def test_what_is_known_in_part_is_told_in_part() -> None:
    found = told(plan(precision=["fp16", "int8", "bf16"], new_tokens=[5, 10]), make_run(cell()))
    assert (found.known, found.cells, found.unknown) == (2, 6, ["int8", "bf16"])
    assert str(found).startswith("about 48 s for 2 of 6 cells; no earlier figures of int8, bf16 here")
    sweeps = [Sweep(prompt_tokens=[512]), Sweep(batch_size=[1])]
    assert told(plan(workloads=sweeps), make_run(cell(prompt_tokens=512))).unknown == ["fp16"]


def test_a_budget_cooldowns_and_peaks() -> None:
    run = make_run(cell(), peaks=PeaksRecord(outcome=Failed(kind="error", message="x"), wall_s=4.0))
    assert told(plan(), run).known_s == pytest.approx(4 + 22)
    assert told(plan(cooldown=3), run).known_s == pytest.approx(4 + 22 + 3)
    assert told(plan(budget=10), run).known_s == pytest.approx(4 + 10)


def test_weights_prepared_once_are_not_reckoned_again() -> None:
    edges = [edge("start", 0), edge("prepare", 1), edge("setup", 607 * SECOND)]
    prepared = replace(cell(), edges=edges, wall_s=622.0)
    assert prepared.ready
    prepared = replace(prepared, ready=replace(prepared.ready, at_ns=600 * SECOND))
    assert told(plan(), make_run(prepared)).known_s == pytest.approx(22)


def test_dry_run_reads_the_runs_that_lie_here_and_passes_over_what_is_none(
    qbench: Qbench, tmp_path: Path
) -> None:
    (tmp_path / "qbench-runs" / "broken").mkdir(parents=True)
    (tmp_path / "qbench-runs" / "broken" / "plan.json").write_text("{}")
    run = make_run(cell("fp32"))
    RunFolder.create(tmp_path / "qbench-runs" / "other", run.plan, HERE).append(run.cells[0])
    options = ["-m", "random:qwen2.5-0.5b", "--device", "cpu", "--rounds", "3", "--batch-size", "1,2"]
    done = qbench("orchestrate", "-p", "fp32", *options, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == [
        "2 cells, in 3 rounds, each in its own random order: 6 cells",
        "budget: 10 min 30 s",
        "time: at most about 10 min 30 s, by the budget; no earlier figures of fp32 here",
    ]
    precise = qbench("orchestrate", "-p", "fp16", *options[:4], "--precise", "1%", "--dry-run")
    assert precise.stdout.splitlines()[-3] == (
        "1 cell, in 5 to 50 rounds, until every ratio is known within 1.0%; the time is for 5"
    )
