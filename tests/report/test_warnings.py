"""Warnings below the table, and runs that have none."""

import msgspec
import pytest
from analyses import warnings_of
from golden_text import Golden
from sample_records import DONE, edge, make_cell, make_job, make_ready, make_run, make_trial, torch_memory

from schemas.frames import Done, Failed
from schemas.job import RANDOM_WEIGHTS_WARNING, ModelSource, Workload
from schemas.record import Run, Skipped

RANDOM = ModelSource(kind="random", location="x", name="random-x", notice=RANDOM_WEIGHTS_WARNING)
HIDDEN = "NVML lists no process 7: it has no CUDA context, or a container hides pids"


def test_a_plain_run_has_no_warnings() -> None:
    assert warnings_of(make_run(make_cell("fp16"), make_cell("int8"))) == []


def test_a_notice_of_many_jobs_is_shown_once() -> None:
    jobs = [make_job(name, model=RANDOM) for name in ("fp16", "int8")]
    assert warnings_of(make_run(jobs=jobs)) == [RANDOM_WEIGHTS_WARNING]


@pytest.mark.parametrize("reason", [None, "no NVIDIA driver library"])
def test_a_cpu_comes_with_the_reason(reason: str | None, golden: Golden) -> None:
    jobs = [make_job(name, device="cpu") for name in ("fp16", "int8")]
    (line,) = warnings_of(make_run(jobs=jobs, gpu_reason=reason))
    golden(line)
    assert ("(no NVIDIA driver library)" in line) == (reason is not None)


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_a_row_whose_versions_differ_from_the_baseline_names_both(package: str, golden: Golden) -> None:
    versions = {"fp16": "1.0", "int8": "2.0", "awq": "1.0"}
    cells = [make_cell(name, ready=make_ready(**{package: each})) for name, each in versions.items()]
    cells.append(cells[1])  # another row of the same worker
    (line,) = warnings_of(make_run(*cells))
    golden(line)
    assert line.startswith(f"int8 ran with {package} 2.0 (fp16: 1.0): ")


def test_two_packages_of_a_row_share_a_line(golden: Golden) -> None:
    base = make_cell("fp16", ready=make_ready(torch="1", transformers="5", bitsandbytes="1"))
    other = make_cell("int8", ready=make_ready(torch="2", transformers="6", bitsandbytes="2"))
    (line,) = warnings_of(make_run(base, other))
    assert line.startswith("int8 ")
    golden(line)


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_without_a_baseline_a_mix_of_versions_names_the_rows(package: str, golden: Golden) -> None:
    versions = {"bf16": "1.0", "int8": "2.0", "awq": "1.0"}
    cells = [make_cell(name, ready=make_ready(**{package: each})) for name, each in versions.items()]
    (line,) = warnings_of(make_run(*cells))
    assert line.startswith(package)
    golden(line)


def test_other_packages_may_differ_and_workers_without_versions_are_ignored() -> None:
    first = make_cell("fp16", ready=make_ready(torch="1", bitsandbytes="1"))
    second = make_cell("int8", ready=make_ready(torch="1", bitsandbytes="2"))
    dead = make_cell("awq", ready=None, outcome=Failed(kind="crashed", message="gone"))
    assert warnings_of(make_run(first, second, dead)) == []


def test_trials_that_did_not_fit_are_counted(golden: Golden) -> None:
    outcome = Done(at_ns=0, trials_planned=20, trials_measured=6, sample_text=None)
    cell = make_cell(outcome=outcome, job=make_job(budget_s=32.5))
    (line,) = warnings_of(make_run(cell))
    golden(line)
    assert line.startswith("fp16: 6 of 20 trials ")
    assert " 32 s " in line


def test_a_first_trial_cut_short_reports_its_tokens(golden: Golden) -> None:
    outcome = Done(at_ns=0, trials_planned=20, trials_measured=1, sample_text=None)
    trial = make_trial(new_tokens=9, token_s=[0.1] * 8, cut_short=True)
    job = make_job("awq", budget_s=70, workload=Workload(prompts=["one"] * 20, new_tokens=128))
    (line,) = warnings_of(make_run(make_cell("awq", outcome=outcome, trials=[trial], job=job)))
    golden(line)
    assert line.startswith("awq: 1 of 20 trials, 9 of 128 tokens ")
    assert " 1 min 10 s " in line
    whole = msgspec.structs.replace(DONE, trials_planned=1)
    (line,) = warnings_of(make_run(make_cell("awq", outcome=whole, trials=[trial], job=job)))
    assert "1 of 1 trial, 9 of 128 tokens" in line  # the only trial, and incomplete


def test_a_skipped_cell_is_named_but_a_failed_one_is_left_to_the_notes(golden: Golden) -> None:
    skipped = make_cell("int8", outcome=Skipped(reason="the budget of 5 s is spent"), job=None, trials=[])
    failed = make_cell("awq", outcome=Failed(kind="error", message="boom"), trials=[])
    (line,) = warnings_of(make_run(skipped, failed))
    assert line.startswith("int8: ")
    golden(line)


def hidden_run(uuid: str | None) -> Run:
    edges = [
        edge(name, at_ns, torch=torch_memory(1), device=5, reason=HIDDEN)
        for at_ns, name in enumerate(("load", "warmup", "end"))
    ]
    return make_run(make_cell(edges=edges, ready=make_ready(uuid)))


def test_hidden_pids_are_reported_once_per_precision(golden: Golden) -> None:
    (line,) = warnings_of(hidden_run("GPU-1"))
    assert line.startswith("fp16: ")
    assert line.endswith(HIDDEN)
    golden(line)


def test_a_missing_resident_set_is_not_a_warning() -> None:
    assert warnings_of(hidden_run(None)) == []


def test_general_warnings_come_first() -> None:
    outcome = Done(at_ns=0, trials_planned=2, trials_measured=1, sample_text=None)
    job = make_job(model=RANDOM, device="cpu", budget_s=5)
    lines = warnings_of(make_run(make_cell(outcome=outcome, job=job), gpu_reason="no driver"))
    assert [line.split()[0] for line in lines] == ["random", "no", "fp16:"]


@pytest.mark.parametrize(("lengths", "warned"), [((10, 90), True), ((64, 64), False)])
def test_rows_on_different_prompts_are_reported(
    lengths: tuple[int, int], warned: bool, golden: Golden
) -> None:
    trials = [make_trial(prompt_tokens=length) for length in lengths]
    part = Done(at_ns=0, trials_planned=2, trials_measured=1, sample_text=None)
    run = make_run(make_cell("fp16", trials=trials), make_cell("awq", trials=trials[:1], outcome=part))
    lines = warnings_of(run)
    golden(lines)
    assert any("1 to 2 prompts" in line for line in lines) == warned
    assert warnings_of(make_run(make_cell("fp16", trials=trials), make_cell("awq", trials=trials))) == []


def test_larger_batches_use_the_same_prompts_in_fewer_trials() -> None:
    trials = [make_trial(prompt_tokens=length) for length in (10, 90)]
    assert warnings_of(make_run(make_cell("fp16", trials=trials), make_cell("fp16", trials=trials[1:]))) == []
