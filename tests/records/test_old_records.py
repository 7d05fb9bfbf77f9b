"""Records of three earlier states of the schema are still read, reported and compared.

Each run in `tests/golden/` was measured on an H100 and is cut to a few cells. Missing fields show how old it
is; they are unknown, and never a reason to refuse the record.
"""

import gzip
import json
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from click.testing import CliRunner
from conftest import ROOT
from golden_text import Golden

from orchestrator.cli.compare import Comparisons, compare
from orchestrator.cli.memory import show_memory
from orchestrator.cli.report import report
from orchestrator.records.store import read_run
from schemas.frames import Done
from schemas.record import Run


class OldRun(NamedTuple):
    """A run, the fields that its records lack, and facts that must still be read."""

    name: str
    lacks: set[str]
    samples_file: str
    cells: int
    samples: list[int]

    @property
    def folder(self) -> Path:
        return ROOT / "tests/golden" / self.name

    def read(self) -> Run:
        return read_run(self.folder)

    def first_line(self) -> dict[str, Any]:
        plain, archived = self.folder / "records.jsonl", self.folder / "records.jsonl.gz"
        text = plain.read_bytes() if plain.exists() else gzip.decompress(archived.read_bytes())
        return dict(json.loads(text.splitlines()[0]))


RUNS = [
    OldRun(
        "h100-random-0.5b",
        {"decode", "depth", "setup", "profile", "warmed_up", "round", "twin", "calibration"},
        "fp16.jsonl",
        4,
        [184, 124, 101, 101],
    ),
    OldRun(
        "h100-precisions-7b",
        {"round", "twin", "calibration"},
        "fp16-eager.jsonl.gz",
        8,
        [88, 26, 333, 261, 33, 125, 31],
    ),
    OldRun("h100-joint-7b", set(), "fp16-graph-n24.jsonl.gz", 4, [38, 23, 59, 22]),
]
FIELDS = RUNS[0].lacks
"""Fields added one after another, in records, jobs and workloads."""


@pytest.fixture(params=RUNS, ids=lambda run: run.name)
def old(request: pytest.FixtureRequest) -> OldRun:
    return request.param  # type: ignore[no-any-return]


def output(command: Any, *arguments: object) -> str:
    result = CliRunner().invoke(command, list(map(str, arguments)), standalone_mode=False)
    assert result.exception is None
    assert result.return_value == 0
    return result.stdout


def test_the_records_are_as_old_as_they_should_be(old: OldRun) -> None:
    line = old.first_line()
    present = line.keys() | line["job"].keys() | line["job"]["workload"].keys()
    assert FIELDS - present == old.lacks
    assert (old.folder / "samples" / old.samples_file).exists()


def test_they_are_read_with_their_samples(old: OldRun) -> None:
    run = old.read()
    assert len(run.cells) == len(run.plan.jobs) == old.cells
    done = [cell for cell in run.cells if isinstance(cell.outcome, Done)]
    assert done
    assert [len(cell.samples) for cell in done] == old.samples


def test_missing_fields_have_their_defaults(old: OldRun) -> None:
    job = old.read().cells[0].job
    assert job
    defaults = {
        "decode": job.workload.decode == "eager",
        "depth": job.workload.depth == 0,
        "round": job.round == 0,
    }
    assert all(is_default for name, is_default in defaults.items() if name in old.lacks)


def test_they_are_reported(old: OldRun, golden: Golden) -> None:
    golden(output(report, old.folder, "--format", "md"))


def test_their_memory_is_reported(old: OldRun, golden: Golden) -> None:
    golden(output(show_memory, old.folder))


def test_they_are_compared(old: OldRun, golden: Golden) -> None:
    limits = ["--fail-if", "loaded>1.001", "--fail-if", "decode<0.999"]
    text = output(compare, old.folder, old.folder, *limits, "--json")
    (found,) = msgspec.json.decode(text, type=Comparisons).runs.values()
    assert found.pairs
    assert {pair.comparison.ratio for pair in found.pairs} == {1.0}
    assert found.unmatched == []
    golden(output(compare, old.folder, old.folder))
