"""Tokens of decode modes compared with eager decode: where they diverge, and when nothing is reported."""

from typing import Any

from golden_text import Golden
from hypothesis import given
from hypothesis import strategies as st
from sample_records import make_cell, make_job, make_trial

from orchestrator.analysis.divergence import Divergence, divergence_sentence, divergences, first_divergence
from schemas.frames import Failed
from schemas.job import DecodeMode, Workload
from schemas.record import CellRecord

NO_CAPTURE = Failed(kind="unsupported", message="its outlier path synchronises")


def tokens_cell(
    decode: DecodeMode, *answers: list[int], precision: str = "fp16", **fields: Any
) -> CellRecord:
    trials = [make_trial(index, token_ids=answer) for index, answer in enumerate(answers)]
    job = make_job(precision, workload=Workload(prompts=["one"], decode=decode))
    return make_cell(precision, job=job, trials=trials, **fields)


def test_the_first_trial_that_differs_is_reported_with_its_first_differing_token(golden: Golden) -> None:
    eager = tokens_cell("eager", [1, 2, 3], [4, 5, 6], [7, 8, 9])
    graph = tokens_cell("graph", [1, 2, 3], [4, 0, 0], [0, 8, 9])
    assert first_divergence([graph, eager]) == [
        Divergence(precision="fp16", decode="graph", trial=1, token=1, trials_differing=2, trials_compared=3)
    ]
    ((found,),) = divergences([eager, graph]).values()
    golden(divergence_sentence(found))


def test_equal_tokens_are_not_a_divergence() -> None:
    eager, graph = tokens_cell("eager", [1, 2, 3]), tokens_cell("graph", [1, 2, 3])
    assert first_divergence([eager, graph]) == []


def test_only_tokens_of_both_are_compared() -> None:
    eager = tokens_cell("eager", [1, 2, 3, 4], [5, 6])
    assert first_divergence([eager, tokens_cell("graph", [1, 2])]) == []
    assert first_divergence([eager, tokens_cell("graph", [1, 2], [5, 6, 7], [8])]) == []


def test_without_eager_decode_nothing_is_compared() -> None:
    graph, compiled = tokens_cell("graph", [1]), tokens_cell("compile", [2])
    assert first_divergence([graph, compiled]) == []
    assert first_divergence([tokens_cell("eager", [3], outcome=NO_CAPTURE), graph]) == []


def test_other_precisions_may_differ() -> None:
    cells = [
        tokens_cell("eager", [1, 2]),
        tokens_cell("eager", [1, 3], precision="awq"),
        tokens_cell("generate", [1, 4], precision="awq"),
    ]
    ((found,),) = divergences(cells).values()
    assert (found.precision, found.decode, found.token) == ("awq", "generate", 1)


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=8), st.lists(st.integers(0, 3), min_size=1, max_size=8)
)
def test_a_divergence_is_at_the_end_of_the_common_prefix(one: list[int], other: list[int]) -> None:
    found = first_divergence([tokens_cell("eager", one), tokens_cell("graph", other)])
    if found:
        token = found[0].token
        assert one[:token] == other[:token]
        assert one[token] != other[token]
    else:
        shorter = min(len(one), len(other))
        assert one[:shorter] == other[:shorter]
