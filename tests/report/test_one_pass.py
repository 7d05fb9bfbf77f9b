"""A report computes each figure once, no matter how many tables, notes and sentences show it."""

import shutil
from pathlib import Path

import pytest
from call_counts import calls_by_name
from click.testing import CliRunner
from sample_records import H100_PEAKS, MIB, edge, h100_cell, make_job, make_run, torch_memory

from orchestrator.analysis.best_mode import best_modes
from orchestrator.analysis.bounds import decode_pace, prefill_pace
from orchestrator.analysis.comparison.measured_run import groups_of, qualities
from orchestrator.analysis.divergence import divergences
from orchestrator.analysis.intervals import compare_all
from orchestrator.analysis.memory.ledger import ledgers
from orchestrator.analysis.memory.peak_gap import peak_gap
from orchestrator.analysis.memory.phases import phase_memory
from orchestrator.analysis.rounds import comparisons, noise_floor, typical_run
from orchestrator.cli.compare import compare
from orchestrator.cli.memory import show_memory
from orchestrator.cli.report import report
from orchestrator.records.store import RunFolder
from schemas.job import DecodeMode, Workload
from schemas.record import CellRecord

ROUNDS = 6
ROWS = 4
"""Two precisions in two decode modes."""


def cell(precision: str, decode: DecodeMode, round_: int) -> CellRecord:
    edges = [
        edge("load", 0, torch=torch_memory(0), process=500 * MIB, device=600 * MIB),
        edge("warmup", 1, torch=torch_memory(100 * MIB), process=700 * MIB, device=800 * MIB),
        edge("decode", 2, torch=torch_memory(100 * MIB), process=700 * MIB, device=800 * MIB),
        edge("end", 3, torch=torch_memory(100 * MIB), process=700 * MIB, device=800 * MIB),
    ]
    speed = 100 if precision == "fp16" else 50 + round_ % 3  # so that the ratio varies over rounds
    load = Workload(prompts=["one"], new_tokens=128, decode=decode)
    job = make_job(precision, workload=load, round=round_)
    return h100_cell(precision, decode, tok_s=speed, busy_ms=6.0, edges=edges, job=job)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of two precisions and two decode modes, in several rounds."""
    modes: tuple[DecodeMode, ...] = ("eager", "graph")
    cells = [cell(name, mode, at) for at in range(ROUNDS) for name in ("fp16", "int8") for mode in modes]
    run = make_run(*cells, peaks=H100_PEAKS)
    kept = RunFolder.create(tmp_path / "run", run.plan, run.environment)
    for each in run.cells:
        kept.append(each)
    return tmp_path / "run"


FORMS = ["table", "md", "csv", "json"]


@pytest.mark.parametrize("form", FORMS)
def test_a_report_computes_each_figure_once(folder: Path, form: str) -> None:
    from scipy.stats import bootstrap

    once = (typical_run, comparisons, noise_floor, compare_all, bootstrap, best_modes, divergences)
    per_row = (phase_memory, decode_pace, prefill_pace)
    arguments = [str(folder), "--format", form, "--verbose"]
    with calls_by_name(*once, *per_row) as calls:
        result = CliRunner().invoke(report, arguments, standalone_mode=False)
    assert result.exception is None
    assert "int8" in result.output
    assert calls == {each.__name__: 1 for each in once} | {each.__name__: ROWS for each in per_row}


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["table", "json"])
def test_a_memory_report_computes_each_figure_once_per_row(folder: Path, form: list[str]) -> None:
    per_row = (phase_memory, ledgers, peak_gap)
    with calls_by_name(typical_run, *per_row) as calls:
        result = CliRunner().invoke(show_memory, [str(folder), *form], standalone_mode=False)
    assert result.exception is None
    assert "int8 graph" in result.output
    assert calls == {"typical_run": 1} | {each.__name__: ROWS for each in per_row}


def test_a_comparison_computes_the_figures_of_each_run_once(folder: Path, tmp_path: Path) -> None:
    """The first run is compared with both others."""
    runs = [shutil.copytree(folder, tmp_path / name) for name in "abc"]
    with calls_by_name(groups_of, typical_run, best_modes, qualities, decode_pace) as calls:
        result = CliRunner().invoke(compare, list(map(str, runs)), standalone_mode=False)
    assert result.exception is None
    assert "int8" in result.output
    assert calls == {
        "groups_of": 3,
        "typical_run": 3,
        "best_modes": 3,
        "qualities": 3 * ROWS,
        "decode_pace": 3 * ROWS * ROUNDS,
    }
