"""The FP16 cell that each cell is compared with."""

from typing import Any

import pytest
from sample_records import make_cell, make_job

from orchestrator.analysis.baselines import baseline_of, find_baselines
from schemas.frames import Failed
from schemas.job import Workload
from schemas.record import CellRecord, Skipped

FAILED = Failed(kind="error", message="boom")


def cell(
    precision: str, outcome: Any = None, round_: int = 0, aa_control: bool = False, **load: Any
) -> CellRecord:
    fields = {} if outcome is None else {"outcome": outcome}
    workload = Workload(prompts=["one"], **load)
    job = make_job(precision, workload=workload, round=round_, aa_control=aa_control)
    return make_cell(precision, job=job, **fields)


@pytest.mark.parametrize(
    "load", [{"depth": 8}, {"batch_size": 2}, {"prompt_tokens": 64}, {"new_tokens": 5}, {"decode": "graph"}]
)
def test_the_baseline_has_the_same_workload_and_decode_mode(load: dict[str, Any]) -> None:
    one, other = cell("fp16"), cell("fp16", **load)
    assert baseline_of(cell("awq"), find_baselines([other, one])) is one
    assert baseline_of(cell("awq", **load), find_baselines([one, other])) is other
    assert baseline_of(cell("awq", **load), find_baselines([one])) is None


def test_an_fp16_cell_is_its_own_baseline() -> None:
    first, second = cell("fp16"), cell("fp16")
    assert baseline_of(second, find_baselines([first, second])) is second


def test_the_aa_control_is_compared_like_any_other_precision() -> None:
    control, baseline = cell("fp16", aa_control=True), cell("fp16")
    assert baseline_of(control, find_baselines([control, baseline])) is baseline


def test_a_row_may_be_of_another_round_than_its_baseline() -> None:
    baseline = cell("fp16", round_=2)
    assert baseline_of(cell("awq", round_=1), find_baselines([baseline])) is baseline


@pytest.mark.parametrize("outcome", [FAILED, Skipped(reason="budget")])
def test_a_baseline_without_figures_is_none(outcome: Failed | Skipped) -> None:
    lost = cell("fp16", outcome)
    assert baseline_of(cell("awq"), find_baselines([lost])) is None
    assert baseline_of(lost, find_baselines([lost])) is None
