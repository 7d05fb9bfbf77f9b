"""What is on disk: read back as it was written, whole cells only, and never one run over another."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
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
INT8 = make_cell("int8", outcome=Failed(kind="out-of-memory", message="no room"), trials=[], ready=None)
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
    folder.keep_peaks(replace(H100_PEAKS, datasheet=sheet))
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


def test_a_run_comes_back_as_it_was(folder: RunFolder) -> None:
    for cell in (FP16, INT8, AWQ):
        folder.append(cell)
    run = make_run(FP16)
    assert read_run(folder.path) == msgspec.structs.replace(run, cells=[FP16, INT8, AWQ])


def test_a_run_without_a_finished_cell_can_be_read(folder: RunFolder) -> None:
    assert cells_of(folder) == []


def test_samples_have_a_file_of_their_own(folder: RunFolder) -> None:
    folder.append(FP16)
    assert len((folder.path / "samples" / "fp16-eager-n5.jsonl").read_bytes().splitlines()) == 3
    line = msgspec.json.decode((folder.path / "records.jsonl").read_bytes())
    assert line["samples"] == []
    assert line["sampler"]["samples"] == 3
    assert cells_of(folder)[0].samples == FP16.samples


def test_samples_of_before_new_tokens_were_in_their_name_are_found(folder: RunFolder) -> None:
    folder.append(FP16)
    samples = folder.path / "samples" / "fp16-eager-n5.jsonl"
    samples.rename(samples.with_name("fp16-eager.jsonl"))
    assert cells_of(folder) == [FP16]


def test_lost_samples_do_not_cost_the_record(folder: RunFolder) -> None:
    folder.append(FP16)
    (folder.path / "samples" / "fp16-eager-n5.jsonl").unlink()
    assert cells_of(folder) == [msgspec.structs.replace(FP16, samples=[])]


@pytest.mark.parametrize("kept_bytes", [1, 100, -1])
def test_a_torn_last_line_is_passed_over(folder: RunFolder, kept_bytes: int) -> None:
    folder.append(FP16)
    whole = (folder.path / "records.jsonl").read_bytes()
    (folder.path / "records.jsonl").write_bytes(whole + whole[:kept_bytes])
    assert cells_of(folder) == [FP16]


def test_a_spoilt_line_in_between_is_named_not_passed_over(folder: RunFolder) -> None:
    folder.append(FP16)
    records = folder.path / "records.jsonl"
    records.write_bytes(b'{"precision": 5}\n' + records.read_bytes())
    with pytest.raises(BadInput, match="can't be read"):
        read_run(folder.path)


def test_records_named_in_place_of_their_folder_are_the_folder(folder: RunFolder) -> None:
    folder.append(FP16)
    assert read_records(folder.path / "records.jsonl") == read_run(folder.path)


@pytest.mark.parametrize("name", ["records.jsonl", "theirs.jsonl"])
def test_records_by_themselves_are_a_run_of_an_unknown_machine(
    folder: RunFolder, tmp_path: Path, name: str
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
    assert machine.gpu_reason == "the records lie without their environment.json"


def test_a_file_of_another_name_is_no_part_of_the_folder_it_lies_in(folder: RunFolder) -> None:
    folder.append(FP16)
    shutil.copy(folder.path / "records.jsonl", folder.path / "theirs.jsonl")
    assert read_records(folder.path / "theirs.jsonl").environment.cpu_count is None


def test_a_file_without_records_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    with pytest.raises(BadInput, match="is no run folder and holds no records"):
        read_records(tmp_path / "empty")


@pytest.mark.parametrize("content", [b"no records\n", b'{"precision": "\xff"}\n'])
def test_a_file_of_something_else_is_bad_input(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "notes.txt").write_bytes(content)
    with pytest.raises(BadInput, match="can't be read"):
        read_records(tmp_path / "notes.txt")


def test_samples_are_left_out_where_they_are_not_wanted(folder: RunFolder) -> None:
    folder.append(FP16)
    assert read_records(folder.path, samples=False).cells == [msgspec.structs.replace(FP16, samples=[])]


def test_a_taken_folder_is_refused_and_left_as_it_is(folder: RunFolder) -> None:
    before = (folder.path / "plan.json").read_bytes()
    other = make_run(INT8)
    with pytest.raises(BadInput, match="holds a run already") as caught:
        RunFolder.create(folder.path, other.plan, other.environment)
    assert caught.value.option == "--out"
    assert (folder.path / "plan.json").read_bytes() == before


def test_a_folder_without_a_run_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    run = make_run(FP16)
    folder = RunFolder.create(tmp_path, run.plan, run.environment)
    folder.append(FP16)
    assert cells_of(folder) == [FP16]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_in_the_way_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = make_run(FP16)
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(BadInput, match="can't be made"):
            RunFolder.create(path, run.plan, run.environment)


def test_what_is_no_run_folder_is_bad_input(tmp_path: Path, folder: RunFolder) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "empty", tmp_path / "file", tmp_path / "absent"):
        with pytest.raises(BadInput, match="is no run folder"):
            read_run(path)
    (folder.path / "environment.json").unlink()
    with pytest.raises(BadInput, match=r"no .*environment\.json"):
        read_run(folder.path)


def test_a_plan_of_another_make_is_bad_input(folder: RunFolder) -> None:
    (folder.path / "plan.json").write_text('{"command": 5}')
    with pytest.raises(BadInput, match="Read it with the version that wrote it"):
        read_run(folder.path)


def test_every_appended_cell_survives_a_kill(tmp_path: Path) -> None:
    """A writer is killed at full speed: what it had said it wrote is there, and nothing half."""
    writer = start(APPEND_FOREVER, tmp_path / "run")
    assert writer.stdout is not None
    for line in writer.stdout:
        if int(line) >= 30:
            break
    writer.send_signal(signal.SIGKILL)
    said = [int(line) for line in writer.stdout]
    writer.wait()
    cells = read_run(tmp_path / "run").cells
    assert [cell.bits_per_weight for cell in cells] == list(range(len(cells)))
    assert len(cells) >= (said[-1] if said else 30) + 1
    assert all(cell.outcome == DONE and len(cell.samples) == 20 for cell in cells)


def test_no_file_is_ever_seen_half_written(tmp_path: Path) -> None:
    """A kill may come at any time: while a file is written again and again, it is whole at every look."""
    peaks = tmp_path / "run" / "peaks.json"
    sizes = set()
    with start(KEEP_PEAKS, tmp_path / "run") as writer:
        while writer.poll() is None:
            if peaks.exists():
                sizes.add(peaks.stat().st_size)
    assert writer.returncode == 0
    assert len(sizes) == 1
