"""A run with gzipped records and samples is read, reported and compared like any other, but not resumed."""

import gzip
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from golden_text import Golden
from msgspec.structs import replace
from sample_records import MIB, edge, make_cell, make_job, make_run, sample, torch_memory

from orchestrator.cli.compare import compare
from orchestrator.cli.memory import show_memory
from orchestrator.cli.orchestrate import orchestrate
from orchestrator.cli.report import report
from orchestrator.errors import BadInput
from orchestrator.records.store import RunFolder, find_records, read_records, read_run

EDGES = [
    edge("start", 1, device=9 * MIB),
    edge("load", 2, torch=torch_memory(7 * MIB), process=9 * MIB, device=10 * MIB),
    edge("end", 9, torch=torch_memory(7 * MIB), process=9 * MIB, device=10 * MIB),
]
RUN = make_run(
    make_cell("fp16", edges=EDGES, samples=[sample(2, device=3 * MIB), sample(4, process=1)]),
    make_cell("int8", edges=EDGES, samples=[sample(3)]),
    jobs=[make_job("fp16"), make_job("int8"), make_job("awq")],
)


def compress(file: Path) -> None:
    file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes(), mtime=0))
    file.unlink()


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    folder = RunFolder.create(tmp_path / "plain" / "run", RUN.plan, RUN.environment)
    for cell in RUN.cells:
        folder.append(cell)
    return folder.path


@pytest.fixture
def archived(plain: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(plain, tmp_path / "archived" / "run")
    for file in folder.rglob("*.jsonl"):
        compress(file)
    return folder


def invoke(command: object, *arguments: object) -> Result:
    return CliRunner().invoke(command, list(map(str, arguments)), standalone_mode=False)  # type: ignore[arg-type]


def test_records_and_samples_are_read_back(archived: Path) -> None:
    assert not list(archived.rglob("*.jsonl"))
    assert read_run(archived) == RUN
    assert read_records(archived / "records.jsonl.gz") == RUN


def test_records_are_read_without_their_folder(archived: Path, tmp_path: Path) -> None:
    brought = shutil.copy(archived / "records.jsonl.gz", tmp_path / "theirs.jsonl.gz")
    assert read_records(brought).cells == [replace(cell, samples=[]) for cell in RUN.cells]


@pytest.mark.parametrize("command", [report, show_memory], ids=["report", "memory"])
def test_commands_print_the_same_as_for_the_plain_run(command: object, plain: Path, archived: Path) -> None:
    expected = invoke(command, plain).stdout
    shown = invoke(command, archived).stdout
    assert RUN.cells[0].precision in expected
    printed = shown.replace(str(archived), str(plain)).replace("records.jsonl.gz", "records.jsonl")
    assert printed == expected
    assert str(archived / "records.jsonl") in invoke(report, archived).stdout


def test_an_archived_run_is_compared(plain: Path, archived: Path) -> None:
    result = invoke(compare, plain, archived / "records.jsonl.gz", "--fail-if", "loaded>1.001")
    assert result.return_value == 0
    assert "1.00×" in result.stdout


def test_a_history_lists_each_run_once(plain: Path, archived: Path, tmp_path: Path) -> None:
    shutil.copy(plain / "records.jsonl", archived / "records.jsonl")
    assert find_records(tmp_path) == [archived / "records.jsonl", plain / "records.jsonl"]
    (archived / "records.jsonl").unlink()
    assert find_records(tmp_path) == [archived / "records.jsonl.gz", plain / "records.jsonl"]
    assert invoke(compare, "--history", tmp_path, "-p", "fp16").stdout.count("/run") == 2


def test_an_archived_run_is_not_resumed(archived: Path, golden: Golden) -> None:
    before = {file: file.read_bytes() for file in archived.rglob("*") if file.is_file()}
    refused = invoke(orchestrate, "--resume", archived).exception
    assert isinstance(refused, BadInput)
    assert (refused.option, refused.value) == ("--resume", str(archived))
    golden(str(refused).replace(str(archived), "RUN"))
    assert before == {file: file.read_bytes() for file in archived.rglob("*") if file.is_file()}


def damaged(whole: bytes) -> dict[str, bytes]:
    return {"cut": whole[:-20], "plain": b"{}\n", "flipped": whole[:15] + b"\xff\xff" + whole[17:]}


@pytest.mark.parametrize("damage", ["cut", "plain", "flipped"])
def test_a_damaged_archive_is_bad_input(archived: Path, damage: str) -> None:
    records = archived / "records.jsonl.gz"
    records.write_bytes(damaged(records.read_bytes())[damage])
    with pytest.raises(BadInput) as caught:
        read_run(archived)
    assert caught.value.option == "RUN"
    assert "can't be read" in str(caught.value)
