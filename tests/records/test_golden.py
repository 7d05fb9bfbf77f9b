"""An old record still decodes, and gives the same figures as when it was measured.

`golden/h100-random-0.5b` is a run on an H100 80GB: random weights in the shapes of Qwen2.5-0.5B, measured
with version 0.1.0. Only its paths were anonymized. The figures below are facts of that run: a failing test
means that old records are now read differently.
"""

import json
from pathlib import Path

import pytest
from analyses import rows_of
from golden_text import Golden

from orchestrator.analysis.memory.cell_memory import cell_memories
from orchestrator.analysis.memory.phases import PhaseMemory, phase_memory
from orchestrator.analysis.metrics import CellMetrics
from orchestrator.records.store import read_run
from orchestrator.report.memory_table import print_memory
from orchestrator.report.summary import as_json, as_markdown, print_summary
from schemas.frames import Done
from schemas.job import RANDOM_WEIGHTS_WARNING
from schemas.record import Run

MIB = 2**20
GOLDEN = Path(__file__).parents[1] / "golden" / "h100-random-0.5b"


@pytest.fixture(scope="module")
def run() -> Run:
    return read_run(GOLDEN)


@pytest.fixture(scope="module")
def rows(run: Run) -> dict[str, CellMetrics]:
    return {row.precision: row for row in rows_of(run)}


@pytest.fixture(scope="module")
def phases(run: Run) -> list[tuple[str, PhaseMemory]]:
    """Every phase of every cell in which torch had a CUDA context."""
    found = [(cell.precision, phase) for cell in run.cells for phase in phase_memory(cell)]
    return [(name, phase) for name, phase in found if phase.reserved_bytes is not None]


def test_the_whole_record_decodes(run: Run) -> None:
    assert [cell.precision for cell in run.cells] == ["fp16", "int8", "int8-t0", "awq"]
    assert all(isinstance(cell.outcome, Done) for cell in run.cells)
    assert [len(cell.trials) for cell in run.cells] == [6, 1, 1, 1]
    assert [len(cell.samples) for cell in run.cells] == [184, 124, 101, 101]
    assert {gpu.name for gpu in run.environment.gpus} == {"NVIDIA H100 80GB HBM3"}
    assert run.plan.jobs[0].model.notice == RANDOM_WEIGHTS_WARNING


def test_footprints(rows: dict[str, CellMetrics]) -> None:
    loaded = {name: round(row.loaded_bytes / MIB) for name, row in rows.items() if row.loaded_bytes}
    assert loaded == {"fp16": 942, "int8": 602, "int8-t0": 602, "awq": 438}
    saved = {name: round(row.saved_versus_baseline or 0, 2) for name, row in rows.items()}
    assert saved == {"fp16": 0, "int8": 0.36, "int8-t0": 0.36, "awq": 0.54}


def test_the_footprint_is_little_more_than_the_weights(rows: dict[str, CellMetrics]) -> None:
    for row in rows.values():
        assert row.loaded_bytes == pytest.approx(row.weight_bytes, rel=0.01)


def test_speeds_agree_with_the_raw_times(run: Run, rows: dict[str, CellMetrics]) -> None:
    for cell in run.cells:
        tokens = sum(len(trial.token_s) for trial in cell.trials)
        decode_s = sum(trial.decode_s for trial in cell.trials)
        assert rows[cell.precision].decode_tok_s == pytest.approx(tokens / decode_s)
        # CUDA events and the host's clock timed the same steps.
        assert sum(sum(trial.token_s) for trial in cell.trials) == pytest.approx(decode_s, rel=0.02)
    assert (rows["fp16"].decode_tok_s or 0) > (rows["int8-t0"].decode_tok_s or 0)
    assert (rows["int8-t0"].decode_tok_s or 0) > (rows["int8"].decode_tok_s or 0)


def test_nvml_sees_torchs_reserved_memory_and_the_context(
    phases: list[tuple[str, PhaseMemory]],
) -> None:
    assert len(phases) == 4 * 5  # context, load, warm-up, prefill, decode
    for name, phase in phases:
        assert phase.allocated_bytes is not None
        assert phase.reserved_bytes is not None
        assert phase.process_bytes is not None
        assert phase.device_bytes is not None
        assert phase.outside_torch_bytes is not None
        assert phase.allocated_bytes <= phase.reserved_bytes <= phase.process_bytes <= phase.device_bytes
        assert 400 * MIB < phase.outside_torch_bytes < 900 * MIB, (name, phase.phase)


def test_edges_were_read_by_both_sides_at_the_same_time(run: Run) -> None:
    for cell in run.cells:
        for edge in cell.edges:
            if edge.reading is not None and edge.phase.torch is not None:
                assert 0 < edge.reading.at_ns - edge.phase.at_ns < 20_000_000
                assert edge.reading.process_bytes is not None
                assert edge.phase.torch.reserved_bytes <= edge.reading.process_bytes


def test_samples_kept_their_period_and_the_peak(run: Run, rows: dict[str, CellMetrics]) -> None:
    for cell in run.cells:
        assert cell.sampler is not None
        assert cell.sampler.period_s == pytest.approx(0.1, rel=0.05)
        assert cell.sampler.cpu_s < 0.01 * cell.sampler.wall_s
        highest = max(sample.device_bytes or 0 for sample in cell.samples)
        assert highest >= (rows[cell.precision].nvml_peak_bytes or 0)


def test_the_table(run: Run, capsys: pytest.CaptureFixture[str], golden: Golden) -> None:
    print_summary(run, Path("RUN"))
    shown = capsys.readouterr().out
    golden(shown)
    assert "random-qwen2.5-0.5b on NVIDIA H100 80GB HBM3: 20 prompts × 128 new tokens" in shown
    line = next(line for line in shown.splitlines() if line.strip().startswith("awq"))
    assert "438" in line
    assert "54%" in line
    assert RANDOM_WEIGHTS_WARNING in shown
    assert "int8: 1 of 20 trials" in shown


def test_markdown_and_json_agree(run: Run, rows: dict[str, CellMetrics]) -> None:
    markdown = as_markdown(run).splitlines()
    table = [line for line in markdown if line.startswith("|")]
    assert len(table) == 2 + len(rows)
    assert len({line.count("|") for line in table}) == 1
    assert any(line.startswith("| awq |") and "| 438 |" in line for line in table)
    summary = json.loads(as_json(run))
    assert [row["precision"] for row in summary["rows"]] == list(rows)
    assert summary["rows"][0]["decode_tok_s"] == rows["fp16"].decode_tok_s
    assert RANDOM_WEIGHTS_WARNING in summary["notes"]


def test_the_memory_table(run: Run, capsys: pytest.CaptureFixture[str], golden: Golden) -> None:
    print_memory(cell_memories(run))
    shown = capsys.readouterr().out
    golden(shown)
    load = next(line for line in shown.splitlines() if line.split()[:1] == ["load"])
    assert load.split()[1:3] == ["942", "956"]
    tables = [line for line in shown.splitlines() if line.split()[:1] == ["load"]]
    assert len(tables) == 4


def test_it_names_no_folder_of_the_machine_that_measured_it() -> None:
    for file in GOLDEN.rglob("*.json*"):
        assert '"/' not in file.read_text(), file
