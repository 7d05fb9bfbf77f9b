"""Run folders are read as they were written: complete cells only, and no run overwrites another."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from golden_text import Golden
from sample_records import DONE, MIB, edge, make_cell, make_run, sample, torch_memory

from orchestrator.errors import BadInput
from orchestrator.records.store import RunFolder, read_records, read_run
from schemas.frames import Failed
from schemas.record import CellRecord, SamplerStats, Skipped

FP16 = make_cell(
    "fp16",
    edges=[edge("start", 1), edge("load", 5, torch=torch_memory(7), process=9, device=10), edge("end", 9)],
    samples=[sample(2, device=3 * MIB), sample(4, process=1), sample(6)],
    sampler=SamplerStats(source="nvml", samples=3, period_s=0.1, cpu_s=0.01, wall_s=1.0),
    started_at="2026-01-01T00:00:00+00:00",
    wall_s=1.5,
    log="logs/fp16.log",
)
INT8 = make_cell("int8", outcome=Failed(kind="out-of-memory", message="out of memory"), trials=[], ready=None)
AWQ = make_cell("awq", outcome=Skipped(reason="the budget is spent"), job=None, trials=[])

APPEND_FOREVER = """
import sys
from pathlib import Path
from sample_records import MIB, make_cell, make_run, sample
from orchestrator.records.store import RunFolder

run = make_run()
folder = RunFolder.create(Path(sys.argv[1]), run.plan, run.environment)
number = 0
while True:
    cell = make_cell(f"p{number}", bits_per_weight=float(number), samples=[sample(number)] * 20)
    folder.append(cell)
    print(number, flush=True)
    number += 1
"""

KEEP_PEAKS = """
import sys
from pathlib import Path
from msgspec.structs import replace
from sample_records import H100_PEAKS, make_run
from orchestrator.records.store import RunFolder
from schemas.record import Datasheet

run = make_run()
folder = RunFolder.create(Path(sys.argv[1]), run.plan, run.environment)
sheet = Datasheet(source="long" * 2_000_000, read_bytes_per_s=1.0, matrix_flop_per_s={})
for _ in range(10):
    folder.write_peaks(replace(H100_PEAKS, datasheet=sheet))
"""


def start(program: str, folder: Path) -> "subprocess.Popen[str]":
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder)],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = make_run(FP16)
    return RunFolder.create(tmp_path / "deep" / "run", run.plan, run.environment)


def cells_of(folder: RunFolder) -> list[CellRecord]:
    return read_run(folder.path).cells


def test_a_run_is_read_as_it_was_written(folder: RunFolder) -> None:
    for cell in (FP16, INT8, AWQ):
        folder.append(cell)
    run = make_run(FP16)
    assert read_run(folder.path) == msgspec.structs.replace(run, cells=[FP16, INT8, AWQ])


def test_a_run_without_finished_cells_is_read(folder: RunFolder) -> None:
    assert cells_of(folder) == []


def test_samples_are_in_a_separate_file(folder: RunFolder) -> None:
    folder.append(FP16)
    assert len((folder.path / "samples" / "fp16-eager-n5.jsonl").read_bytes().splitlines()) == 3
    line = msgspec.json.decode((folder.path / "records.jsonl").read_bytes())
    assert line["samples"] == []
    assert line["sampler"]["samples"] == 3
    assert cells_of(folder)[0].samples == FP16.samples


@pytest.mark.parametrize("older", ["fp16-eager", "fp16"])
def test_samples_are_found_by_older_file_names(folder: RunFolder, older: str) -> None:
    folder.append(FP16)
    samples = folder.path / "samples" / "fp16-eager-n5.jsonl"
    samples.rename(samples.with_name(f"{older}.jsonl"))
    assert cells_of(folder) == [FP16]


def test_a_record_without_its_samples_is_still_read(folder: RunFolder) -> None:
    folder.append(FP16)
    (folder.path / "samples" / "fp16-eager-n5.jsonl").unlink()
    assert cells_of(folder) == [msgspec.structs.replace(FP16, samples=[])]


@pytest.mark.parametrize("kept_bytes", [1, 100, -1])
def test_a_truncated_last_line_is_ignored(folder: RunFolder, kept_bytes: int) -> None:
    folder.append(FP16)
    whole = (folder.path / "records.jsonl").read_bytes()
    (folder.path / "records.jsonl").write_bytes(whole + whole[:kept_bytes])
    assert cells_of(folder) == [FP16]


def test_an_invalid_line_elsewhere_is_an_error(folder: RunFolder, golden: Golden) -> None:
    folder.append(FP16)
    records = folder.path / "records.jsonl"
    records.write_bytes(b'{"precision": 5}\n' + records.read_bytes())
    with pytest.raises(BadInput) as caught:
        read_run(folder.path)
    assert (caught.value.option, caught.value.value) == ("RUN", str(folder.path))
    golden(caught.value.problem.partition(":")[0])


def test_a_runs_records_file_stands_for_its_folder(folder: RunFolder) -> None:
    folder.append(FP16)
    assert read_records(folder.path / "records.jsonl") == read_run(folder.path)


@pytest.mark.parametrize("name", ["records.jsonl", "theirs.jsonl"])
def test_records_without_their_folder_are_a_run_of_an_unknown_machine(
    folder: RunFolder, tmp_path: Path, golden: Golden, name: str
) -> None:
    folder.append(FP16)
    folder.append(INT8)
    place = tmp_path / "brought"
    place.mkdir()
    shutil.copy(folder.path / "records.jsonl", place / name)
    run = read_records(place / name)
    assert run.cells == [msgspec.structs.replace(cell, samples=[]) for cell in (FP16, INT8)]
    assert run.plan.jobs == [FP16.job, INT8.job]
    machine = run.environment
    assert (machine.commit, machine.cpu_count, machine.gpus) == (None, None, [])
    assert machine.gpu_reason
    golden(machine.gpu_reason)


def test_a_file_with_another_name_does_not_stand_for_its_folder(folder: RunFolder) -> None:
    folder.append(FP16)
    shutil.copy(folder.path / "records.jsonl", folder.path / "theirs.jsonl")
    assert read_records(folder.path / "theirs.jsonl").environment.cpu_count is None


def test_a_file_without_records_is_bad_input(tmp_path: Path, golden: Golden) -> None:
    (tmp_path / "empty").write_text("")
    with pytest.raises(BadInput) as caught:
        read_records(tmp_path / "empty")
    assert (caught.value.option, caught.value.value) == ("RUN", str(tmp_path / "empty"))
    golden([caught.value.problem, caught.value.fix])


@pytest.mark.parametrize("content", [b"no records\n", b'{"precision": "\xff"}\n'])
def test_a_file_of_another_format_is_bad_input(tmp_path: Path, golden: Golden, content: bytes) -> None:
    (tmp_path / "notes.txt").write_bytes(content)
    with pytest.raises(BadInput) as caught:
        read_records(tmp_path / "notes.txt")
    assert (caught.value.option, caught.value.value) == ("RUN", str(tmp_path / "notes.txt"))
    golden([caught.value.problem.partition(":")[0], caught.value.fix])


def test_samples_are_read_only_on_request(folder: RunFolder) -> None:
    folder.append(FP16)
    assert read_records(folder.path, samples=False).cells == [msgspec.structs.replace(FP16, samples=[])]


def test_a_folder_with_a_run_is_refused_and_unchanged(folder: RunFolder, golden: Golden) -> None:
    before = (folder.path / "plan.json").read_bytes()
    other = make_run(INT8)
    with pytest.raises(BadInput) as caught:
        RunFolder.create(folder.path, other.plan, other.environment)
    assert (caught.value.option, caught.value.value) == ("--out", str(folder.path))
    golden([caught.value.problem, caught.value.fix])
    assert (folder.path / "plan.json").read_bytes() == before


def test_a_folder_without_a_run_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    run = make_run(FP16)
    folder = RunFolder.create(tmp_path, run.plan, run.environment)
    folder.append(FP16)
    assert cells_of(folder) == [FP16]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_created_is_bad_input(tmp_path: Path, golden: Golden) -> None:
    (tmp_path / "file").write_text("")
    run = make_run(FP16)
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(BadInput) as caught:
            RunFolder.create(path, run.plan, run.environment)
        assert (caught.value.option, caught.value.value) == ("--out", str(path))
        golden([caught.value.problem, caught.value.fix])


def test_anything_but_a_run_folder_is_bad_input(tmp_path: Path, folder: RunFolder, golden: Golden) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "empty", tmp_path / "file", tmp_path / "absent"):
        with pytest.raises(BadInput) as caught:
            read_run(path)
        assert (caught.value.option, caught.value.value) == ("RUN", str(path))
        golden(str(caught.value).replace(str(tmp_path), ""))
    (folder.path / "environment.json").unlink()
    with pytest.raises(BadInput) as caught:
        read_run(folder.path)
    assert str(folder.path / "environment.json") in caught.value.problem


def test_a_plan_in_another_format_is_bad_input(folder: RunFolder, golden: Golden) -> None:
    (folder.path / "plan.json").write_text('{"command": 5}')
    with pytest.raises(BadInput) as caught:
        read_run(folder.path)
    assert (caught.value.option, caught.value.value) == ("RUN", str(folder.path))
    golden([caught.value.problem.partition(":")[0], caught.value.fix])


def test_every_appended_cell_survives_a_kill(tmp_path: Path) -> None:
    """A writer is killed while it writes: every cell that it reported is there, and none is incomplete."""
    writer = start(APPEND_FOREVER, tmp_path / "run")
    assert writer.stdout is not None
    for line in writer.stdout:
        if int(line) >= 30:
            break
    writer.send_signal(signal.SIGKILL)
    reported = [int(line) for line in writer.stdout]
    writer.wait()
    cells = read_run(tmp_path / "run").cells
    assert [cell.bits_per_weight for cell in cells] == list(range(len(cells)))
    assert len(cells) >= (reported[-1] if reported else 30) + 1
    assert all(cell.outcome == DONE and len(cell.samples) == 20 for cell in cells)


def test_files_are_written_atomically(tmp_path: Path) -> None:
    """A kill may come at any time: while a file is rewritten repeatedly, every reader sees it complete."""
    peaks = tmp_path / "run" / "peaks.json"
    sizes = set()
    with start(KEEP_PEAKS, tmp_path / "run") as writer:
        while writer.poll() is None:
            if peaks.exists():
                sizes.add(peaks.stat().st_size)
    assert writer.returncode == 0
    assert len(sizes) == 1
