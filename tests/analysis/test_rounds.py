"""Rounds: their order, the resulting table, and the effect of drift."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from conftest import Qbench
from plans import bad_input, plan_of
from sample_records import DONE, H100, make_cell, make_job, make_run, make_trial

from orchestrator.analysis.intervals import Comparison
from orchestrator.analysis.rounds import is_precise, typical_run
from orchestrator.analysis.run_analysis import analyze_run
from orchestrator.planning.estimate import Estimate
from orchestrator.planning.plan import MOST_ROUNDS, Plan
from orchestrator.records.keys import key_of
from orchestrator.records.store import read_run
from orchestrator.report.listing import print_plan
from orchestrator.report.notes import notes
from orchestrator.report.summary import as_csv, as_markdown
from schemas.frames import Failed
from schemas.record import CellRecord, Run

PRECISIONS = ["fp16", "int8", "awq"]


def turns(plan: Plan) -> list[list[str]]:
    """Names in the order in which they run, round by round."""
    rounds: dict[int, list[str]] = {}
    for cell in plan.cells:
        rounds.setdefault(cell.job.round, []).append(cell.precision.name + "=" * cell.job.aa_control)
    return list(rounds.values())


def measured(precision: str, tok_s: float, **fields: object) -> CellRecord:
    trial = make_trial(decode_s=4 / tok_s, token_s=[1 / tok_s] * 4)
    return make_cell(precision, job=make_job(precision, **fields), trials=[trial], outcome=DONE)


def run_of(speed: Callable[[str, int, int], float], order: Callable[[int], list[str]], rounds: int) -> Run:
    """A run whose measured speeds are `speed(precision, round, position in time)`."""
    cells, at = [], 0
    for round_ in range(rounds):
        for name in order(round_):
            cells.append(measured(name, speed(name, round_, at), round=round_))
            at += 1
    return make_run(*cells)


# The plan


def test_each_round_has_each_precision_once_in_its_own_order() -> None:
    orders = turns(plan_of(precision=PRECISIONS, rounds=6, decode=["eager"]))
    assert [sorted(each) for each in orders] == [sorted(PRECISIONS)] * 6
    assert len({tuple(each) for each in orders}) > 2
    assert orders == turns(plan_of(precision=PRECISIONS, rounds=6, decode=["eager"]))
    assert orders != turns(plan_of(precision=PRECISIONS, rounds=6, decode=["eager"], seed=1))


def test_one_round_keeps_the_order_that_was_named() -> None:
    assert turns(plan_of(precision=PRECISIONS, decode=["eager"])) == [PRECISIONS]


def test_the_aa_control_runs_in_every_round() -> None:
    plan = plan_of(precision=PRECISIONS, rounds=3, aa=True, decode=["eager"])
    assert [sorted(each) for each in turns(plan)] == [sorted([*PRECISIONS, "fp16="])] * 3
    assert len({key_of(cell.job).stem for cell in plan.cells}) == 12


def test_precise_plans_the_most_rounds_but_budgets_for_the_fewest() -> None:
    plan = plan_of(precision=PRECISIONS, precise=0.01, decode=["eager"])
    assert len(turns(plan)) == MOST_ROUNDS
    assert plan.cells_to_budget == 5 * 3


def test_cells_of_remaining_rounds_are_listed_once(capsys: pytest.CaptureFixture[str]) -> None:
    """The first round is complete, and the second has one cell."""
    plan = plan_of(precision=PRECISIONS, rounds=3, decode=["eager"])
    left = plan._replace(cells=plan.cells[4:])
    print_plan(left, Estimate(0, 0, 5, []))
    output = capsys.readouterr().out.splitlines()
    assert {line.split(":")[0] for line in output if " prompts" in line} == set(PRECISIONS)
    assert "3 cells, in 2 rounds, each in its own random order: 5 cells" in output


@pytest.mark.parametrize("option", [{"aa": True}, {"precise": 0.01}])
def test_options_that_compare_need_the_baseline(option: dict[str, object]) -> None:
    (flag,) = option
    assert bad_input(precision=["int8"], **option).startswith(f"--{flag}: compares with fp16")


# The table


def test_a_row_shows_the_median_round_and_the_ratio_over_all_rounds() -> None:
    speeds = {"fp16": [100, 104, 98, 102, 96], "int8": [50, 53, 48, 51, 49]}
    run = run_of(lambda name, round_, _: speeds[name][round_], lambda _: ["int8", "fp16"], 5)
    analysis = analyze_run(run)
    rows = {row.precision: row for row in analysis.rows}
    assert {name: round(row.decode_tok_s or 0) for name, row in rows.items()} == {"fp16": 100, "int8": 50}
    int8 = rows["int8"]
    assert int8.rounds == 5
    assert int8.decode_versus_baseline == pytest.approx(0.502, abs=0.002)
    assert 0.48 < (int8.decode_versus_low or 0) < 0.502 < (int8.decode_versus_high or 0) < 0.52
    assert int8.verdict == "slower"
    assert "| int8 | 100 | 50.0 | 0.50× [0." in as_markdown(run)
    assert any(line.startswith("int8: slower, 0.50× [0.4") for line in notes(analysis))
    assert ",slower," in as_csv(run)


def test_fp16_compared_with_itself_is_the_noise_floor() -> None:
    controls = [measured("fp16", 104 + round_ % 2, round=round_, aa_control=True) for round_ in range(6)]
    run = run_of(lambda name, *_: 103.0 if name == "int8" else 100.0, lambda _: ["fp16", "int8"], 6)
    run = msgspec.structs.replace(run, cells=[*run.cells, *controls])
    analysis = analyze_run(run)
    assert analysis.noise_floor == pytest.approx(0.045, abs=0.001)
    (found,) = analysis.comparisons.values()
    assert found.verdict == "can't tell"
    assert "FP16 differed from itself by 4.5%" in found.why
    assert [key_of(cell).name for cell in typical_run(run).cells] == ["fp16", "int8"]


def test_one_round_is_reported_without_an_interval() -> None:
    run = run_of(lambda name, *_: 50 if name == "int8" else 100, lambda _: ["fp16", "int8"], 1)
    analysis = analyze_run(run)
    rows = analysis.rows
    assert rows[1].decode_versus_low is rows[1].verdict is None
    assert any(line.startswith("one round: ") for line in notes(analysis))


def test_failed_rounds_are_ignored_and_noted() -> None:
    run = run_of(lambda *_: 100, lambda _: ["fp16", "int8"], 3)
    lost = msgspec.structs.replace(run.cells[1], outcome=Failed(kind="crashed", message="gone"), trials=[])
    run = msgspec.structs.replace(run, cells=[run.cells[0], lost, *run.cells[2:]])
    analysis = analyze_run(run)
    (found,) = analysis.comparisons.values()
    assert found.rounds == 2
    assert "int8: measured in 2 of 3 rounds" in notes(analysis)


def test_a_run_is_precise_if_every_interval_is_narrow() -> None:
    run = run_of(lambda name, round_, _: 100 + round_ * (name == "awq"), lambda _: PRECISIONS, 5)
    widths = [each.half_width or 0 for each in analyze_run(run).comparisons.values()]
    assert is_precise(run, max(widths))
    assert not is_precise(run, max(widths) / 2)
    assert not is_precise(make_run(), 0.5)


# Drift


def test_interleaving_cancels_drift_unlike_blocks() -> None:
    """The machine slows down by 1 % from each cell to the next; both precisions are equally fast."""

    def drifting(_name: str, _round: int, at: int) -> float:
        return 100 * 0.99**at

    planned = turns(plan_of([H100], precision=["fp16", "int8"], rounds=10, decode=["eager"]))
    shuffled = analyze_run(run_of(drifting, lambda round_: planned[round_], 10)).comparisons
    assert {each.verdict for each in shuffled.values()} <= {"same", "can't tell"}
    block = [measured("fp16", drifting("", 0, at), round=at) for at in range(10)]
    block += [measured("int8", drifting("", 0, 10 + at), round=at) for at in range(10)]
    found: list[Comparison] = list(analyze_run(make_run(*block)).comparisons.values())
    assert [each.verdict for each in found] == ["slower"]


# A real run


@pytest.mark.slow
def test_a_run_of_rounds(qbench: Qbench, tiny_llama: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n")
    named = ["-p", "fp32", "-p", "fp16", "--model", tiny_llama, "--prompts", prompts, "--new-tokens", "9"]
    done = qbench("orchestrate", *named, "--rounds", "2", "--aa", "--budget", "90", "--out", "run")
    assert done.returncode == 0, done.stderr
    assert "FP16 differed from itself by" in done.stdout
    assert "fp32: can't tell, 2 rounds are too few" in done.stdout
    run = read_run(tmp_path / "run")
    assert sorted(key_of(cell).name for cell in run.cells) == [
        "fp16",
        "fp16",
        "fp16 (A/A)",
        "fp16 (A/A)",
        "fp32",
        "fp32",
    ]
    assert len({cell.ready.pid for cell in run.cells if cell.ready}) == 6
    assert [job.round for job in run.plan.jobs] == [0, 0, 0, 1, 1, 1]
