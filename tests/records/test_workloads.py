"""Which cells share a workload, which FP16 cell one is compared with, and how workloads are told apart."""

from typing import Any

import pytest
from sample_records import h100_cell, make_cell, make_job, make_run

from orchestrator.records.workloads import (
    baseline_of,
    by_workload,
    find_baselines,
    workload_key,
    workload_labels,
)
from orchestrator.report.summary import as_markdown
from schemas.frames import Failed
from schemas.job import Workload
from schemas.record import CellRecord, Skipped

FAILED = Failed(kind="error", message="boom")


def cell(precision: str, outcome: Any = None, **load: Any) -> CellRecord:
    fields = {} if outcome is None else {"outcome": outcome}
    return make_cell(precision, job=make_job(precision, workload=Workload(prompts=["one"], **load)), **fields)


def test_precision_decode_mode_and_warmup_are_no_part_of_a_workload() -> None:
    assert workload_key(cell("fp16")) == workload_key(cell("awq", decode="graph", warmup=5))


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


@pytest.mark.parametrize("outcome", [FAILED, Skipped(reason="budget")])
def test_a_baseline_without_figures_is_none(outcome: Failed | Skipped) -> None:
    lost = cell("fp16", outcome)
    assert baseline_of(cell("awq"), find_baselines([lost])) is None
    assert baseline_of(lost, find_baselines([lost])) is None


def test_cells_are_grouped_in_order_and_those_without_a_job_left_out() -> None:
    cells = [cell("fp16", depth=8), cell("fp16"), make_cell("int8", job=None), cell("awq", depth=8)]
    groups = by_workload(cells)
    assert [[one.precision for one in group] for group in groups.values()] == [["fp16", "awq"], ["fp16"]]


def test_only_what_differs_is_in_a_label() -> None:
    loads: list[dict[str, Any]] = [{}, {"prompt_tokens": 512}, {"prompt_tokens": 512, "depth": 4096}]
    keys = [workload_key(cell("fp16", **load)) for load in loads]
    assert list(workload_labels(keys).values()) == [
        "depth 0",
        "depth 0, prompts of 512 tokens",
        "depth 4,096, prompts of 512 tokens",
    ]
    assert workload_labels(keys[:1]) == {keys[0]: ""}


def test_rows_that_differ_in_new_tokens_say_so_and_are_compared_each_with_its_own() -> None:
    counts = {"fp16": {16: 100.0, 64: 80.0}, "nf4": {16: 150.0, 64: 160.0}}
    cells = [
        h100_cell(name, tok_s=tok_s, workload={"new_tokens": count})
        for name, speeds in counts.items()
        for count, tok_s in speeds.items()
    ]
    text = as_markdown(make_run(*cells))
    assert "1 prompts × 16 to 64 new tokens, batch 1" in text
    counts_shown = [line.split("|")[3].strip() for line in text.splitlines() if line.startswith("| fp16 | g")]
    assert counts_shown == ["16", "64"]
    assert "| best mode of each | 16 new tokens | 64 new tokens |" in text
    assert "| nf4 | 1.50×, graph | 2.00×, graph |" in text
