"""The estimated time of a plan, based on earlier runs; without such runs there is no estimate."""

from pathlib import Path
from typing import Any

import pytest
from conftest import Qbench
from golden_text import Golden
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


def cell(precision: str = "fp16", is_later: bool = False, decode: Any = "eager", **load: Any) -> CellRecord:
    """20 prompts × 5 tokens: 7 s to start, 1 s of set-up, and 28 trials of 0.5 s, 8 of them untimed."""
    workload = Workload(prompts=PROMPTS, decode=decode, **({"new_tokens": 5} | load))
    began_s = 50 if is_later else 0
    return make_cell(
        precision,
        job=make_job(precision, workload=workload, model=MODEL),
        trials=[make_trial(index, new_tokens=workload.new_tokens) for index in range(20)],
        edges=[edge("start", 0), edge("setup", 7 * SECOND)],
        setup=SetUp(setup_s=1.0),
        began_ns=began_s * SECOND,
        wall_s=15.0 if is_later else 22.0,
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


def estimated(plan: Plan, *runs: Run) -> Estimate:
    return estimate(plan, HERE, runs)


def test_the_same_plan_takes_as_long_as_before(golden: Golden) -> None:
    assert estimated(plan(), make_run(cell())).known_s == pytest.approx(22)
    golden(str(estimated(plan(), make_run(cell()))))


def test_a_worker_starts_once_per_round_for_all_its_cells() -> None:
    run = make_run(cell(), cell(new_tokens=10, is_later=True))
    without_start_s = estimated(plan(), run).known_s - 7
    both = estimated(plan(new_tokens=[5, 10]), run)
    gap_s = 50 - 22
    assert both.known_s == pytest.approx(7 + 2 * (15 + gap_s))
    assert without_start_s == pytest.approx(15 + gap_s)
    assert estimated(plan(rounds=3), run).known_s == pytest.approx(3 * (22 + gap_s))


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
    assert estimated(plan(**size), make_run(cell())).known_s == pytest.approx(7 + 1 + trials * trial_s)


def test_the_median_of_the_nearest_size_counts() -> None:
    slow = [replace(cell(new_tokens=5), wall_s=wall_s) for wall_s in (22.0, 32.0, 90.0)]
    runs = [make_run(each) for each in (*slow, replace(cell(new_tokens=200), wall_s=9000.0))]
    assert estimated(plan(), *runs).known_s == pytest.approx(32)


@pytest.mark.parametrize(
    "other",
    [
        make_run(cell("int8")),
        make_run(cell(decode="graph")),
        make_run(replace(cell(), outcome=Failed(kind="error", message="boom"))),
        make_run(replace(cell(), job=make_job(model=replace(MODEL, location="models/other")))),
        make_run(cell(prompt_tokens=512)),  # the plan's prompts have their natural length
        replace(make_run(cell()), environment=replace(HERE, gpus=[T4])),
        replace(make_run(cell()), environment=replace(HERE, cpu="another")),
    ],
)
def test_cells_not_measured_on_this_machine_have_no_estimate(other: Run) -> None:
    found = estimated(plan(), other)
    assert (found.known, found.cells, found.unknown) == (0, 1, ["fp16"])
    assert estimated(plan(budget=90), other).budget_s == 90


def test_unknown_and_limited_by_the_budget(golden: Golden) -> None:
    golden(str(estimated(plan())))
    golden(str(estimated(plan(budget=90))))


def test_a_plan_can_be_known_in_part(golden: Golden) -> None:
    found = estimated(plan(precision=["fp16", "int8", "bf16"], new_tokens=[5, 10]), make_run(cell()))
    assert (found.known, found.cells, found.unknown) == (2, 6, ["int8", "bf16"])
    assert round(found.known_s) == 48
    golden(str(found))
    sweeps = [Sweep(prompt_tokens=[512]), Sweep(batch_size=[1])]
    assert estimated(plan(workloads=sweeps), make_run(cell(prompt_tokens=512))).unknown == ["fp16"]


def test_a_budget_cooldowns_and_peaks() -> None:
    run = make_run(cell(), peaks=PeaksRecord(outcome=Failed(kind="error", message="x"), wall_s=4.0))
    assert estimated(plan(), run).known_s == pytest.approx(4 + 22)
    assert estimated(plan(cooldown=3), run).known_s == pytest.approx(4 + 22 + 3)
    assert estimated(plan(budget=10), run).known_s == pytest.approx(4 + 10)


def test_preparing_weights_is_not_included() -> None:
    edges = [edge("start", 0), edge("prepare", 1), edge("setup", 607 * SECOND)]
    prepared = replace(cell(), edges=edges, wall_s=622.0)
    assert prepared.ready
    prepared = replace(prepared, ready=replace(prepared.ready, at_ns=600 * SECOND))
    assert estimated(plan(), make_run(prepared)).known_s == pytest.approx(22)


def test_dry_run_uses_the_runs_in_this_folder_and_skips_what_is_not_a_run(
    golden: Golden, qbench: Qbench, tmp_path: Path
) -> None:
    (tmp_path / "qbench-runs" / "broken").mkdir(parents=True)
    (tmp_path / "qbench-runs" / "broken" / "plan.json").write_text("{}")
    run = make_run(cell("fp32"))
    RunFolder.create(tmp_path / "qbench-runs" / "other", run.plan, HERE).append(run.cells[0])
    options = ["-m", "random:qwen2.5-0.5b", "--device", "cpu", "--rounds", "3", "--batch-size", "1,2"]
    done = qbench("orchestrate", "-p", "fp32", *options, "--dry-run")
    assert done.returncode == 0, done.stderr
    golden(done.stdout.splitlines()[-3:])
    precise = qbench("orchestrate", "-p", "fp16", *options[:4], "--precise", "1%", "--dry-run")
    golden(precise.stdout.splitlines()[-3])
