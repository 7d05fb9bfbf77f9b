"""Runs on an H100 with decode modes, peaks and kernel times still give the same figures and sentences.

Their records are in `tests/golden/`, cut to the cells that tests read. The figures are facts of those runs: a
failing test means that old records are now read differently.
"""

import analyses
import pytest
from conftest import ROOT
from golden_text import Golden

from orchestrator.analysis.conditions import trial_conditions
from orchestrator.analysis.metrics import CellMetrics, analyze_cells
from orchestrator.analysis.run_analysis import analyze_run
from orchestrator.records.keys import key_of
from orchestrator.records.store import read_run
from orchestrator.report.details import details
from orchestrator.report.notes import notes
from orchestrator.report.summary import as_markdown
from schemas.frames import Done, Failed, Peaks
from schemas.record import Run

RECORDED = ROOT / "tests/golden"


def rows_of(run: Run) -> dict[str, CellMetrics]:
    rows = analyses.rows_of(run)
    return {key_of(cell).name: row for cell, row in zip(run.cells, rows, strict=True)}


@pytest.fixture(scope="module")
def precisions() -> Run:
    return read_run(RECORDED / "h100-precisions-7b")


@pytest.fixture(scope="module")
def modes() -> Run:
    return read_run(RECORDED / "h100-modes" / "7b")


def test_an_unsupported_decode_mode_is_a_failed_row(precisions: Run) -> None:
    outcomes = {key_of(cell).name: cell.outcome for cell in precisions.cells}
    refused = outcomes.pop("int8 graph")
    assert isinstance(refused, Failed)
    assert refused.kind == "unsupported"
    assert refused.message.startswith("it waits for the GPU in every step, at `if outliers.any():`")
    assert "CUDA error" not in refused.message
    assert len(outcomes) == 7
    assert all(isinstance(outcome, Done) for outcome in outcomes.values())


def test_one_worker_measured_all_modes_of_a_precision(modes: Run) -> None:
    assert len({cell.ready.pid for cell in modes.cells if cell.ready}) == 1
    assert [key_of(cell).name for cell in modes.cells] == [
        "fp16 generate",
        "fp16",
        "fp16 graph",
        "fp16 compile",
    ]


def test_speeds_and_roofs(modes: Run) -> None:
    rows = rows_of(modes)
    assert {name: round(row.decode_tok_s or 0, 1) for name, row in rows.items()} == {
        "fp16 generate": 28.1, "fp16": 29.3, "fp16 graph": 130.1, "fp16 compile": 182.5,
    }  # fmt: skip
    assert {round(row.decode_roof_tok_s or 0) for row in rows.values()} == {218}
    shares = [round(row.decode_mbu or 0, 2) for row in rows.values()]
    assert shares == [0.13, 0.13, 0.60, 0.84]
    for row in rows.values():
        assert row.decode_mbu == pytest.approx(
            (row.decode_tok_s or 0) / (row.decode_roof_tok_s or 1), rel=1e-6
        )


def test_the_bound_of_each_row(modes: Run, precisions: Run) -> None:
    bounds = {name: row.decode_bound for name, row in rows_of(modes).items()}
    assert list(bounds.values()) == ["launch", "launch", "bandwidth", "bandwidth"]
    rows = rows_of(precisions)
    assert rows["int8-t0 graph"].decode_bound == "kernel"
    assert {rows[name].decode_bound for name in ("fp16", "int8", "int8-t0", "awq")} == {"launch"}
    kernels = {name: round(row.kernels_per_token or 0) for name, row in rows.items() if row.kernels_per_token}
    assert kernels["fp16"] == 1254
    assert kernels["int8"] == 2682


def test_the_gpus_own_time_is_the_same_with_and_without_a_graph(precisions: Run) -> None:
    rows = rows_of(precisions)
    for name in ("fp16", "int8-t0", "awq"):
        busy_s = rows[name].decode_busy_s
        assert busy_s == pytest.approx(rows[f"{name} graph"].decode_busy_s, rel=0.03)


def test_events_and_wall_agree(modes: Run, precisions: Run) -> None:
    for cell in [*modes.cells, *precisions.cells]:
        for trial in cell.trials:
            assert sum(trial.token_s) == pytest.approx(trial.decode_s, rel=0.02)
            assert len(trial.token_s) == trial.new_tokens - 1 == len(trial.token_ids) - 1


def test_the_sentences(precisions: Run, golden: Golden) -> None:
    lines = notes(analyze_run(precisions))
    golden(lines)
    (launch,) = [line for line in lines if "launch-bound" in line]
    assert launch.startswith("fp16, int8, int8-t0 and awq are launch-bound: ")
    assert {"8%", "22%"} <= set(launch.split())
    assert "int8, waits for 224 copies" in launch
    assert "see fp16 graph, int8-t0 graph and awq graph" in launch
    (ahead,) = [line for line in lines if line.startswith("int8-t0 graph runs at 1.06×")]
    assert {"1.9×", "7.3", "7.7"} <= set(ahead.split())


def test_the_markdown_table(precisions: Run) -> None:
    markdown = as_markdown(precisions)
    assert "| int8-t0 | eager | 64.4 | 15.3 | (0.54×) |" in markdown
    assert "| int8-t0 | graph | 89.4 | 137.7 | 1.06× |" in markdown
    assert "| awq | graph | 73.2 | 97.9 | 0.76× |" in markdown


def test_peaks_are_shown_next_to_the_data_sheet(modes: Run, golden: Golden) -> None:
    assert modes.peaks
    assert isinstance(modes.peaks.outcome, Peaks)
    assert modes.peaks.outcome.measured_s < 5
    assert modes.peaks.datasheet
    for dtype, flop_per_s in modes.peaks.outcome.matrix_flop_per_s.items():
        assert 0.4 < flop_per_s / modes.peaks.datasheet.matrix_flop_per_s[dtype] < 1
    lines = details(modes.peaks, analyze_cells(modes))
    golden(lines)
    text = "\n".join(lines)
    assert "read 3,086 [3,350] GB/s" in text
    assert "compiled in 48 s, 0 graph breaks" in text


def test_a_power_limit_shows_only_in_its_trials() -> None:
    run = read_run(RECORDED / "h100-modes" / "7b-prompts")
    short, long = run.cells
    assert all(trial.clock_limits == [] and trial.power_limited_s == 0 for trial in trial_conditions(short))
    for trial in trial_conditions(long):
        assert trial.clock_limits == ["sw_power_cap"]
        assert (trial.power_limited_s or 0) > 0.3
    (line,) = [line for line in notes(analyze_run(run)) if "power limit" in line]
    assert line.startswith("fp16 graph (prompts of 2,048 tokens): ")
    rows = analyses.rows_of(run)
    assert [row.prefill_bound for row in rows] == ["launch", "compute"]
    assert round(rows[1].prefill_mfu or 0, 2) == 0.61
