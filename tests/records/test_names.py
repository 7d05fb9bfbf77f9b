"""Names of cells, as short as the other cells of their run allow."""

from typing import Any

from golden_text import Golden
from sample_records import h100_cell, make_cell, make_job, make_run

from orchestrator.records.keys import WorkloadKey
from orchestrator.records.names import cell_namer, workload_labels
from orchestrator.report.summary import as_markdown
from schemas.job import Workload
from schemas.record import CellRecord

NATURAL = WorkloadKey(new_tokens=128)
SHORT = NATURAL._replace(prompt_tokens=512)
DEEP = SHORT._replace(depth=4096)


def cell(precision: str, **load: Any) -> CellRecord:
    return make_cell(precision, job=make_job(precision, workload=Workload(prompts=["one"], **load)))


def test_a_label_mentions_only_what_varies(golden: Golden) -> None:
    labels = workload_labels([NATURAL, SHORT, DEEP])
    assert list(labels) == [NATURAL, SHORT, DEEP]
    assert len(set(labels.values())) == 3
    golden(labels.values())


def test_the_only_workload_has_no_label() -> None:
    assert workload_labels([DEEP]) == {DEEP: ""}


def test_every_dimension_has_a_label(golden: Golden) -> None:
    golden(workload_labels([DEEP, WorkloadKey(prompt_tokens=1, batch_size=8, new_tokens=2048)]).values())


def test_a_full_name_adds_the_workload_if_there_are_several(golden: Golden) -> None:
    cells = [cell("fp16", depth=8), cell("awq", decode="graph"), make_cell("int8", job=None)]
    names = list(map(cell_namer(cells), cells))
    assert names[2] == "int8"
    assert cell_namer(cells[1:])(cells[1]) == "awq graph"
    golden(names)


def test_jobs_are_named_like_their_records() -> None:
    cells = [cell("fp16", depth=8), cell("fp16")]
    planned = [each.job for each in cells if each.job]
    assert list(map(cell_namer(planned), planned)) == list(map(cell_namer(cells), cells))


def test_rows_of_different_new_tokens_show_them_and_have_their_own_baselines() -> None:
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
    assert "| best mode | 16 new tokens | 64 new tokens |" in text
    assert "| nf4 | 1.50×, graph | 2.00×, graph |" in text
