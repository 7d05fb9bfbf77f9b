"""Bytes, operations and shares of the roofs, calculated by hand and compared with figures from an H100."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_records import QWEN_7B, QWEN_HALF_B, h100_cell, make_cell, make_job, make_loaded, make_trial

from orchestrator.analysis.roofs import (
    decode_flop,
    decode_mbu,
    decode_mfu,
    decode_step_bytes,
    prefill_bytes,
    prefill_flop,
    prefill_mbu,
    prefill_mfu,
    roof_tok_s,
    seconds_per_step,
)
from schemas.frames import ForwardCosts, Trial
from schemas.job import Workload
from schemas.record import CellRecord

BANDWIDTH = 2.93e12

COSTS = ForwardCosts(
    step_weight_bytes=1000,
    kv_bytes_per_token=10,
    linear_parameters=500,
    head_parameters=70,
    attention_width=3,
)


def small_cell(*trials: Trial, depth: int = 0, costs: ForwardCosts | None = COSTS) -> CellRecord:
    workload = Workload(prompts=["one"], depth=depth)
    return make_cell(
        job=make_job(workload=workload),
        loaded=make_loaded(costs=costs),
        trials=list(trials or [make_trial()]),
    )


def steps(count: int, **fields: Any) -> Trial:
    return make_trial(new_tokens=count + 1, token_s=[0.1] * count, decode_s=0.1 * count, **fields)


# Bytes


def test_the_first_step_reads_the_prompt_and_the_position_that_it_writes() -> None:
    assert decode_step_bytes(small_cell(steps(1))) == 1000 + 10 * (10 + 1)
    assert decode_step_bytes(small_cell(steps(1), depth=100)) == 1000 + 10 * (100 + 10 + 1)


def test_every_sequence_reads_its_growing_context_but_weights_are_read_once() -> None:
    assert decode_step_bytes(small_cell(steps(4))) == 1000 + 10 * (11 + 12 + 13 + 14) / 4
    assert decode_step_bytes(small_cell(steps(4, batch_size=8))) == 1000 + 8 * 10 * 12.5


def test_trials_are_weighted_by_their_steps() -> None:
    """Three steps at 11, 12, 13 positions and one at 21."""
    cell = small_cell(steps(3), steps(1, prompt_tokens=20))
    assert decode_step_bytes(cell) == 1000 + 10 * (11 + 12 + 13 + 21) / 4


def test_prefill_moves_weights_once_and_every_position_of_every_sequence() -> None:
    trial = make_trial(batch_size=2)
    assert prefill_bytes(small_cell(trial, depth=5), trial) == 1000 + 2 * 10 * (5 + 10)


# Arithmetic


def test_arithmetic_of_a_prompt() -> None:
    """Ten tokens through the linear layers, one through the head, 55 pairs of positions in attention."""
    trial = make_trial()
    assert prefill_flop(small_cell(trial), trial) == 2 * 500 * 10 + 2 * 70 + 4 * 3 * 55
    deep = prefill_flop(small_cell(trial, depth=100), trial)
    assert deep == 2 * 500 * 10 + 2 * 70 + 4 * 3 * (100 * 10 + 55)


def test_arithmetic_of_decode() -> None:
    """Each step processes a token through all layers, including the head."""
    trial = steps(2, batch_size=3)
    one_row = 2 * (2 * 500 + 2 * 70) + 4 * 3 * (11 + 12)
    assert decode_flop(small_cell(trial), trial) == 3 * one_row


def test_a_7b_prompt_costs_two_operations_per_parameter_and_token() -> None:
    trial = make_trial(prompt_tokens=2048)
    flop = prefill_flop(small_cell(trial, costs=QWEN_7B), trial)
    assert flop == pytest.approx(2 * 6.525e9 * 2048, rel=0.05)


tokens = st.integers(1, 3000)
batches = st.integers(1, 16)


@given(first=tokens, second=tokens, depth=st.integers(0, 3000), batch=batches)
def test_a_prompt_in_two_parts_costs_the_same_as_in_one(
    first: int, second: int, depth: int, batch: int
) -> None:
    """Except for the logits of the first part."""

    def flop(length: int, before: int) -> float:
        trial = make_trial(prompt_tokens=length, batch_size=batch)
        return prefill_flop(small_cell(trial, depth=before), trial) or 0

    whole = flop(first + second, depth)
    assert flop(first, depth) + flop(second, depth + first) == whole + batch * 2 * COSTS.head_parameters


@given(count=st.integers(1, 300), prompt=tokens, batch=batches)
def test_decode_is_prefill_one_token_at_a_time(count: int, prompt: int, batch: int) -> None:
    trial = steps(count, prompt_tokens=prompt, batch_size=batch)
    one = make_trial(prompt_tokens=1, batch_size=batch)
    singly = [prefill_flop(small_cell(one, depth=prompt + step), one) or 0 for step in range(count)]
    assert decode_flop(small_cell(trial), trial) == sum(singly)


# Shares


@pytest.mark.parametrize(
    ("costs", "tok_s", "mbu", "roof"), [(QWEN_7B, 118, 0.57, 207), (QWEN_HALF_B, 336, 0.11, 2960)]
)
def test_the_h100s_shares_and_roofs(costs: ForwardCosts, tok_s: float, mbu: float, roof: float) -> None:
    cell = h100_cell(tok_s=tok_s, costs=costs)
    assert decode_mbu(cell, BANDWIDTH) == pytest.approx(mbu, abs=0.005)
    assert roof_tok_s(cell, BANDWIDTH) == pytest.approx(roof, rel=0.01)
    assert (decode_mfu(cell, 700e12) or 1) < 0.01


def test_a_long_prompt_is_near_the_arithmetic_roof_only() -> None:
    trial = make_trial(prompt_tokens=2048, prefill_s=0.05)
    cell = small_cell(trial, costs=QWEN_7B)
    assert prefill_mfu(cell, 700e12) == pytest.approx(27.57e12 / 0.05 / 700e12, rel=1e-3)
    assert prefill_mbu(cell, BANDWIDTH) == pytest.approx(0.097, abs=0.001)


def test_shares_are_sums_over_sums() -> None:
    trials = [make_trial(0, prompt_tokens=10, prefill_s=1), make_trial(1, prompt_tokens=30, prefill_s=2)]
    cell = small_cell(*trials)
    flop = sum(prefill_flop(cell, trial) or 0 for trial in trials)
    assert prefill_mfu(cell, 100) == pytest.approx(flop / 3 / 100)


@given(factor=st.floats(0.1, 100), count=st.integers(1, 50), batch=batches)
def test_mbu_is_the_inverse_of_time_and_of_bandwidth(factor: float, count: int, batch: int) -> None:
    trial = steps(count, batch_size=batch)
    slower = make_trial(
        token_s=trial.token_s, decode_s=trial.decode_s * factor, batch_size=batch, new_tokens=count + 1
    )
    mbu = decode_mbu(small_cell(trial), BANDWIDTH)
    assert mbu
    assert decode_mbu(small_cell(slower), BANDWIDTH) == pytest.approx(mbu / factor)
    assert decode_mbu(small_cell(trial), BANDWIDTH * factor) == pytest.approx(mbu / factor)


@given(st.lists(st.builds(steps, st.integers(1, 50), batch_size=batches), min_size=1, max_size=4))
def test_speed_over_the_roof_is_mbu(trials: list[Trial]) -> None:
    cell = small_cell(*trials)
    made = sum(len(trial.token_s) * trial.batch_size for trial in trials)
    tok_s = made / sum(trial.decode_s for trial in trials)
    roof = roof_tok_s(cell, BANDWIDTH)
    assert roof
    assert tok_s / roof == pytest.approx(decode_mbu(cell, BANDWIDTH))


# Unknown is None


def test_without_costs_only_time_is_known() -> None:
    for cell in (small_cell(costs=None), make_cell(loaded=None)):
        trial = cell.trials[0]
        assert decode_step_bytes(cell) is prefill_bytes(cell, trial) is None
        assert decode_flop(cell, trial) is prefill_flop(cell, trial) is None
        assert decode_mbu(cell, 1e9) is decode_mfu(cell, 1e9) is roof_tok_s(cell, 1e9) is None
        assert prefill_mbu(cell, 1e9) is prefill_mfu(cell, 1e9) is None
        assert seconds_per_step(cell) == pytest.approx(0.1)


def test_without_peaks_bytes_are_known_but_not_shares() -> None:
    cell = small_cell()
    assert decode_step_bytes(cell) is not None
    assert decode_mbu(cell, None) is decode_mfu(cell, None) is roof_tok_s(cell, None) is None
    assert prefill_mbu(cell, None) is prefill_mfu(cell, None) is None


def test_one_token_has_no_decode_step() -> None:
    cell = small_cell(make_trial(new_tokens=1, token_s=[], decode_s=1e-7))
    assert seconds_per_step(cell) is decode_step_bytes(cell) is roof_tok_s(cell, 1e9) is None
    assert decode_mbu(cell, 1e9) is decode_mfu(cell, 1e9) is None
    assert prefill_mfu(cell, 1e9) is not None
