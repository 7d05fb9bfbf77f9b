"""Every figure of the table, calculated by hand; unmeasured figures are None with a reason, never 0."""

from typing import Any

import msgspec
import pytest
from analyses import rows_of
from hypothesis import given
from hypothesis import strategies as st
from sample_records import (
    DONE,
    MIB,
    edge,
    make_cell,
    make_loaded,
    make_ready,
    make_run,
    make_trial,
    torch_memory,
)

from orchestrator.analysis.metrics import CellMetrics, end_to_end_tok_s, measure_cell
from schemas.frames import Failed, Trial
from schemas.record import CellRecord, Skipped

FIGURES = [  # figures of a row, not its settings
    field.name
    for field in msgspec.structs.fields(CellMetrics)
    if field.default is None and field.name not in ("reason", "prompt_tokens", "new_tokens")
]

FAILED = Failed(kind="out-of-memory", message="no room", hint="take a smaller model")


def loaded_gpu_cell(precision: str, allocated_bytes: int, decode_s: float) -> CellRecord:
    edges = [
        edge("load", 0, torch=torch_memory(0), process=500 * MIB),
        edge("warmup", 1, torch=torch_memory(allocated_bytes), process=allocated_bytes + 600 * MIB),
        edge("end", 2, torch=torch_memory(allocated_bytes), process=allocated_bytes + 650 * MIB),
    ]
    return make_cell(precision, edges=edges, trials=[make_trial(decode_s=decode_s)])


def test_speed_of_one_trial() -> None:
    row = measure_cell(make_cell())
    assert row.trials == 1
    assert row.ttft_s == 0.1
    assert row.prefill_tok_s == pytest.approx(10 / 0.1)
    assert row.decode_tok_s == pytest.approx(4 / 0.4)  # the first token belongs to prefill
    assert row.end_to_end_tok_s == pytest.approx(5 / 0.5)


def test_rates_are_sums_over_sums_and_ttft_a_median() -> None:
    trials = [
        make_trial(0, prefill_s=0.1, decode_s=0.4),
        make_trial(1, prefill_s=0.2, decode_s=1.6),
        make_trial(2, prefill_s=0.9, decode_s=2.0),
    ]
    row = measure_cell(make_cell(trials=trials))
    assert row.ttft_s == 0.2
    assert row.decode_tok_s == pytest.approx(12 / 4.0)
    assert row.prefill_tok_s == pytest.approx(30 / 1.2)
    assert row.end_to_end_tok_s == pytest.approx(15 / 5.2)


def test_every_sequence_of_a_batch_counts() -> None:
    row = measure_cell(make_cell(trials=[make_trial(batch_size=8)]))
    assert row.ttft_s == 0.1
    assert row.prefill_tok_s == pytest.approx(8 * 10 / 0.1)
    assert row.decode_tok_s == pytest.approx(8 * 4 / 0.4)
    assert row.end_to_end_tok_s == pytest.approx(8 * 5 / 0.5)


def test_one_token_has_no_decode() -> None:
    trial = make_trial(new_tokens=1, decode_s=1e-7, token_s=[], token_ids=[1])
    row = measure_cell(make_cell(trials=[trial]))
    assert row.decode_tok_s is None
    assert row.ttft_s == 0.1
    assert row.end_to_end_tok_s == pytest.approx(1 / 0.1, rel=1e-3)
    other = make_cell("int8", trials=[make_trial()])
    assert rows_of(make_run(make_cell(trials=[trial]), other))[1].decode_versus_baseline is None


def test_a_trial_cut_short_counts_the_tokens_that_it_generated() -> None:
    trial = make_trial(new_tokens=3, decode_s=0.2, token_s=[0.1, 0.1], cut_short=True)
    assert measure_cell(make_cell(trials=[trial])).decode_tok_s == pytest.approx(10)


def test_ratios_and_savings_are_relative_to_fp16_in_any_order() -> None:
    rows = rows_of(
        make_run(
            loaded_gpu_cell("int8", 600 * MIB, decode_s=0.8),
            loaded_gpu_cell("fp16", 1000 * MIB, decode_s=0.4),
        )
    )
    int8, fp16 = rows
    assert int8.decode_versus_baseline == pytest.approx(0.5)
    assert int8.end_to_end_versus_baseline == pytest.approx((5 / 0.9) / (5 / 0.5))
    assert int8.saved_versus_baseline == pytest.approx(0.4)
    assert int8.footprint_bytes == int8.loaded_bytes == 600 * MIB
    assert int8.nvml_peak_bytes == 1250 * MIB
    assert (fp16.decode_versus_baseline, fp16.saved_versus_baseline) == (1, 0)


def test_larger_than_fp16_is_a_negative_saving() -> None:
    rows = rows_of(make_run(loaded_gpu_cell("fp16", 100, 0.4), loaded_gpu_cell("fp32", 200, 0.4)))
    assert rows[1].saved_versus_baseline == -1


def test_on_a_cpu_savings_are_based_on_weights() -> None:
    def cell(precision: str, weight_bytes: int) -> CellRecord:
        edges = [edge("load", 0, process=900), edge("warmup", 1, process=950), edge("end", 2, process=990)]
        return make_cell(
            precision, ready=make_ready(uuid=None), loaded=make_loaded(weight_bytes), edges=edges
        )

    row = rows_of(make_run(cell("fp16", 1000), cell("awq", 300)))[1]
    assert row.saved_versus_baseline == pytest.approx(0.7)
    assert (row.weight_bytes, row.footprint_bytes, row.loaded_bytes) == (300, 300, 950)
    assert row.nvml_peak_bytes is None


def test_without_fp16_there_are_no_ratios() -> None:
    for row in rows_of(make_run(make_cell("int8"), make_cell("awq"))):
        assert row.decode_versus_baseline is row.end_to_end_versus_baseline is None
        assert row.saved_versus_baseline is None
        assert row.decode_tok_s is not None


@pytest.mark.parametrize("outcome", [FAILED, Skipped(reason="the budget is spent")])
def test_a_failed_baseline_gives_no_ratios_either(outcome: Failed | Skipped) -> None:
    fp16, int8 = rows_of(make_run(make_cell("fp16", outcome=outcome), make_cell("int8")))
    assert fp16.reason
    assert int8.decode_versus_baseline is int8.saved_versus_baseline is None


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (FAILED, "out-of-memory: no room (take a smaller model)"),
        (Failed(kind="error", message="boom"), "error: boom"),
        (Skipped(reason="the budget is spent"), "skipped: the budget is spent"),
    ],
)
def test_a_row_without_figures_has_a_reason(outcome: Failed | Skipped, reason: str) -> None:
    """Even if it got as far as a trial: a partial measurement is not a measurement."""
    row = measure_cell(make_cell(outcome=outcome))
    assert row.reason == reason
    assert [getattr(row, name) for name in FIGURES] == [None] * len(FIGURES)


def test_unread_figures_are_none_not_zero() -> None:
    row = measure_cell(make_cell(loaded=None, edges=[]))
    memory = (row.weight_bytes, row.loaded_bytes, row.peak_bytes, row.nvml_peak_bytes, row.footprint_bytes)
    assert memory == (None,) * 5
    assert row.reason is None


def test_without_trials_there_is_no_rate() -> None:
    assert end_to_end_tok_s([]) is None


seconds = st.floats(min_value=1e-6, max_value=1e4)


@st.composite
def trials(draw: st.DrawFn) -> Trial:
    steps = draw(st.integers(0, 20))
    return make_trial(
        batch_size=draw(st.integers(1, 64)),
        prompt_tokens=draw(st.integers(1, 4096)),
        new_tokens=steps + 1,
        prefill_s=draw(seconds),
        decode_s=draw(seconds),
        token_s=[draw(seconds)] * steps,
    )


@given(st.lists(trials(), min_size=1, max_size=6))
def test_rate_times_time_is_tokens(measured: list[Trial]) -> None:
    row = measure_cell(make_cell(trials=measured))
    decoded = sum((trial.new_tokens - 1) * trial.batch_size for trial in measured)
    decode_s = sum(trial.decode_s for trial in measured)
    if decoded:
        assert row.decode_tok_s is not None
        assert row.decode_tok_s * decode_s == pytest.approx(decoded)
    else:
        assert row.decode_tok_s is None
    assert row.end_to_end_tok_s is not None
    whole_s = sum(trial.prefill_s + trial.decode_s for trial in measured)
    assert row.end_to_end_tok_s * whole_s == pytest.approx(
        sum(trial.new_tokens * trial.batch_size for trial in measured)
    )
    assert row.ttft_s is not None
    prefills = [trial.prefill_s for trial in measured]
    assert min(prefills) <= row.ttft_s <= max(prefills)


@st.composite
def cells(draw: st.DrawFn) -> CellRecord:
    """A cell with gaps wherever a real one could have them, and no zero among its figures."""
    sizes = st.none() | st.integers(1, 2**40)
    fields: dict[str, Any] = {
        "outcome": draw(st.sampled_from([DONE, FAILED, Skipped(reason="why")])),
        "ready": draw(st.sampled_from([None, make_ready(), make_ready(uuid=None)])),
        "loaded": draw(st.none() | st.builds(make_loaded, st.integers(1, 2**40))),
        "trials": draw(st.lists(trials(), min_size=1, max_size=3)),
        "edges": [
            edge(
                name,
                at_ns,
                torch=draw(st.none() | st.builds(torch_memory, st.integers(1, 2**40))),
                process=draw(sizes),
                device=draw(sizes),
            )
            for at_ns, name in enumerate(("load", "warmup", "prefill", "decode", "end"))
        ],
    }
    return make_cell(draw(st.sampled_from(["fp16", "int8"])), **fields)


@given(st.lists(cells(), min_size=1, max_size=4))
def test_no_zero_is_invented(measured: list[CellRecord]) -> None:
    rows = rows_of(make_run(*measured))
    assert len(rows) == len(measured)
    for row, cell in zip(rows, measured, strict=True):
        values = {name: getattr(row, name) for name in FIGURES if name != "saved_versus_baseline"}
        assert 0 not in values.values(), values
        assert (row.reason is None) == (cell.outcome == DONE)
        if row.reason:
            assert set(values.values()) == {None}
