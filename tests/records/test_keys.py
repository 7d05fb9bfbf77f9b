"""The identity of a cell: equality, file names, rows and baselines all follow from its key."""

import ast
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from sample_records import make_cell, make_job

from orchestrator.precisions.catalog import find_precisions
from orchestrator.records.keys import BASELINE, CellKey, by_workload, key_of
from orchestrator.records.store import read_records
from schemas.job import DecodeMode, Job, Workload, decode_job

MODES: list[DecodeMode] = ["eager", "graph", "compile", "generate"]
PRECISIONS = ["fp16", "int8", "int8-t0", "fp16-graph", "fp16-eager-n5", "aa", "r1"]
"""Real names, and names that could be mistaken for other parts of a stem."""
COMMITTED_SAMPLES = sorted(
    path.relative_to(ROOT)
    for folder in ("results", "tests/golden")
    for path in (ROOT / folder).rglob("samples")
)

workloads = st.builds(
    Workload,
    prompts=st.lists(st.sampled_from(["one", "two"]), min_size=1, max_size=2),
    prompt_tokens=st.none() | st.integers(1, 3),
    depth=st.integers(0, 2),
    new_tokens=st.integers(1, 3),
    batch_size=st.integers(1, 3),
    decode=st.sampled_from(MODES),
    warmup=st.integers(0, 2),
)
jobs = st.builds(
    make_job,
    st.sampled_from(PRECISIONS),
    workload=workloads,
    seed=st.integers(0, 2),
    round=st.integers(0, 2),
    aa_control=st.booleans(),
)


def cell_facts(job: Job) -> tuple[object, ...]:
    """What identifies a cell, spelled out as a reference for keys."""
    load = job.workload
    size = (load.prompt_tokens, load.depth, load.batch_size, load.new_tokens)
    return job.precision, load.decode, size, job.round, job.aa_control


@given(st.lists(jobs, min_size=2, max_size=20))
def test_cells_are_the_same_exactly_if_their_facts_are(some: list[Job]) -> None:
    facts = set(map(cell_facts, some))
    assert len(set(map(key_of, some))) == len(facts)
    assert len({key_of(job).stem for job in some}) == len(facts)


@given(jobs)
def test_a_record_has_the_key_of_its_job(job: Job) -> None:
    assert key_of(make_cell(job.precision, job=job)) == key_of(job)
    assert key_of(decode_job(msgspec.json.encode(job))) == key_of(job)


@given(jobs, st.integers(0, 9))
def test_rounds_share_a_row(job: Job, round_: int) -> None:
    other = key_of(replace(job, round=round_))
    assert other.without_round == key_of(job).without_round
    assert (other == key_of(job)) == (round_ == job.round)


@given(jobs)
def test_a_baseline_differs_only_in_precision(job: Job) -> None:
    key = key_of(job)
    assert key.baseline == key_of(replace(job, precision=BASELINE, aa_control=False))
    assert key.baseline.is_baseline
    assert key.is_baseline == (key == key.baseline)


@given(jobs)
def test_a_name_mentions_precision_mode_and_control_but_no_size(job: Job) -> None:
    key = key_of(job)
    assert key.name.startswith(key.precision)
    same = CellKey(key.precision, key.decode, aa_control=key.aa_control)
    assert key.name == same.name
    others = {same._replace(decode=mode, aa_control=flag) for mode in MODES for flag in (False, True)}
    assert len({other.name for other in others}) == len(others)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (CellKey("fp16"), "fp16"),
        (CellKey("awq", "graph"), "awq graph"),
        (CellKey("fp16", "compile", aa_control=True), "fp16 compile (A/A)"),
    ],
)
def test_names(key: CellKey, name: str) -> None:
    assert key.name == name


def test_the_stem_of_a_cell_with_everything_set() -> None:
    load = Workload(
        prompts=["one"], prompt_tokens=512, depth=4096, new_tokens=64, batch_size=8, decode="graph"
    )
    job = make_job("fp16", workload=load, round=3, aa_control=True)
    assert key_of(job).stem == "fp16-graph-b8-p512-d4096-n64-r3-aa"


def test_a_cell_without_a_job_is_its_precision() -> None:
    assert key_of(make_cell("int8", job=None)) == CellKey("int8")


def test_the_aa_control_has_its_old_name_in_records() -> None:
    encoded = json.loads(msgspec.json.encode(make_job(aa_control=True)))
    assert encoded["twin"] is True
    assert "aa_control" not in encoded
    assert decode_job(msgspec.json.encode(encoded)).aa_control


@pytest.mark.parametrize("folder", COMMITTED_SAMPLES, ids=lambda folder: folder.parent.name)
def test_committed_samples_each_belong_to_one_cell(folder: Path) -> None:
    stems = {file.name.partition(".jsonl")[0] for file in (ROOT / folder).iterdir()}
    found = {
        key: next((stem for stem in (key.stem, *key.older_stems) if stem in stems), None)
        for key in map(key_of, read_records(ROOT / folder.parent, samples=False).cells)
    }
    assert set(found.values()) - {None} == stems
    assert len([stem for stem in found.values() if stem]) == len(stems)


def test_the_parent_knows_no_precision_by_name_but_the_baseline() -> None:
    precisions = find_precisions().keys()
    named = {
        (file.relative_to(ROOT).as_posix(), node.value)
        for folder in ("orchestrator", "schemas")
        for file in (ROOT / folder).rglob("*.py")
        if file.parent.name != "precisions"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and node.value in precisions
    }
    assert named == {("orchestrator/records/keys.py", BASELINE)}


def test_cells_are_grouped_by_workload_in_order() -> None:
    def cell(precision: str, **load: Any) -> Any:
        return make_cell(precision, job=make_job(precision, workload=Workload(prompts=["one"], **load)))

    cells = [cell("fp16", depth=8), cell("fp16"), make_cell("int8", job=None), cell("awq", depth=8)]
    groups = by_workload(cells)
    assert [[one.precision for one in group] for group in groups.values()] == [["fp16", "awq"], ["fp16"]]


def test_precision_mode_and_warmup_are_not_part_of_a_workload() -> None:
    eager = make_job("fp16", workload=Workload(prompts=["one"]))
    graph = make_job("awq", workload=Workload(prompts=["one"], decode="graph", warmup=5))
    assert key_of(eager).workload == key_of(graph).workload
