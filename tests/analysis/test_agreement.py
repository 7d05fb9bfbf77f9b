"""Agreement of greedy tokens with FP16's: shares calculated by hand, and cases without one."""

import csv
import io
import json

import msgspec
import pytest
from analyses import rows_of
from hypothesis import given
from hypothesis import strategies as st
from sample_records import make_cell, make_job, make_run, make_trial

from orchestrator.analysis.agreement import agreements, mean_agreement
from orchestrator.report.summary import as_csv, as_json
from schemas.frames import Failed
from schemas.job import ModelSource, Workload
from schemas.record import CellRecord

FOUR = [1, 2, 3, 4]
RANDOM = ModelSource(kind="random", location="qwen2.5-7b", name="random-qwen2.5-7b")
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=6)


def answering(*answers: list[int], precision: str = "int8", **fields: object) -> CellRecord:
    trials = [make_trial(index, token_ids=answer) for index, answer in enumerate(answers)]
    return make_cell(precision, job=make_job(precision, **fields), trials=trials)


def test_agreement_is_the_share_of_tokens_before_the_first_difference() -> None:
    fp16 = answering(FOUR, FOUR, FOUR, FOUR, precision="fp16")
    int8 = answering(FOUR, [1, 2, 9, 4], [9, 2, 3, 4], [1, 2, 3, 9])
    found = agreements([int8], [fp16])
    assert found == {0: 1, 1: 0.5, 2: 0, 3: 0.75}
    assert mean_agreement(found) == 0.5625
    assert mean_agreement({}) is None


def test_only_complete_answers_of_both_are_compared() -> None:
    fp16 = answering(FOUR, FOUR, precision="fp16")
    cut = msgspec.structs.replace(fp16, trials=[make_trial(0, token_ids=[1, 2], cut_short=True)])
    assert agreements([answering(FOUR)], [fp16]) == {0: 1}
    assert agreements([cut], [fp16]) == {}
    assert agreements([fp16], [cut]) == {}


def test_rounds_add_prompts_that_others_had_no_budget_for() -> None:
    fp16 = answering(FOUR, FOUR, precision="fp16")
    assert agreements([answering(FOUR), answering(FOUR, [1, 9, 9, 9])], [fp16]) == {0: 1, 1: 0.25}


def test_random_weights_and_failed_cells_have_none() -> None:
    fp16 = answering(FOUR, precision="fp16")
    lost = msgspec.structs.replace(answering(FOUR), outcome=Failed(kind="timeout", message="too slow"))
    assert agreements([lost], [fp16]) == {}
    drawn = [answering(FOUR, precision=each, model=RANDOM) for each in ("int8", "fp16")]
    assert agreements(drawn[:1], drawn[1:]) == {}


@given(TOKENS)
def test_equal_answers_agree_completely(tokens: list[int]) -> None:
    assert agreements([answering(tokens)], [answering(tokens)]) == {0: 1}


@given(
    st.integers(1, 6).flatmap(
        lambda size: st.tuples(*[st.lists(st.integers(0, 2), min_size=size, max_size=size)] * 2)
    )
)
def test_agreement_is_symmetric_and_a_share(pair: tuple[list[int], list[int]]) -> None:
    one, other = (answering(tokens) for tokens in pair)
    (share,) = agreements([one], [other]).values()
    assert agreements([other], [one]) == {0: share}
    assert 0 <= share <= 1
    assert (share == 1) == (pair[0] == pair[1])


def test_rows_have_an_agreement_but_fp16_has_none() -> None:
    cells = [answering(FOUR, precision="fp16"), answering([1, 2, 3, 9])]
    assert [row.agreement_with_baseline for row in rows_of(make_run(*cells))] == [None, 0.75]
    assert rows_of(make_run(*cells[1:]))[0].agreement_with_baseline is None
    graph = answering(FOUR, workload=Workload(prompts=["one"], new_tokens=5, decode="graph"))
    assert rows_of(make_run(*cells, graph))[2].agreement_with_baseline is None  # nor FP16 in this mode


def test_csv_and_json_include_the_agreement() -> None:
    run = make_run(answering(FOUR, precision="fp16"), answering([1, 2, 3, 9]))
    lines = list(csv.DictReader(io.StringIO(as_csv(run))))
    assert [line["agreement_with_baseline"] for line in lines] == ["", "0.75"]
    rows = json.loads(as_json(run))["rows"]
    assert [row["agreement_with_baseline"] for row in rows] == [None, pytest.approx(0.75)]
