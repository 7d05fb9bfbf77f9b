"""The four bounds, on figures from an H100, and at their thresholds."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_records import QWEN_7B, QWEN_HALF_B, h100_cell, make_cell, make_loaded, make_trial

from orchestrator.analysis.bounds import BUSY_SHARE, NEAR_ROOF, Bound, Pace, decode_pace, prefill_pace
from orchestrator.analysis.roofs import decode_mbu, decode_mfu
from schemas.frames import ForwardCosts, KernelTimes, Profile
from schemas.job import DecodeMode
from schemas.record import CellRecord

BANDWIDTH, MATRIX = 2.93e12, 700e12
AWQ_BYTES = 5_400_000_000


@pytest.mark.parametrize(
    ("decode", "costs", "tok_s", "busy_ms", "weight_bytes", "bound"),
    [
        ("eager", QWEN_HALF_B, 48, 2.328, None, "launch"),
        ("eager", QWEN_HALF_B, 9.3, 4.31, 630_000_000, "launch"),
        ("eager", QWEN_7B, 23.4, 7.649, None, "launch"),
        ("graph", QWEN_7B, 124.8, 8.007, None, "bandwidth"),
        ("compile", QWEN_7B, 180.3, 5.603, None, "bandwidth"),
        ("graph", QWEN_7B, 93, 10.382, AWQ_BYTES, "kernel"),
        ("graph", QWEN_HALF_B, 389.6, 2.662, None, "kernel"),
        ("compile", QWEN_HALF_B, 1170, 0.858, None, "kernel"),
    ],
)
def test_the_bound_of_decode_on_an_h100(
    decode: DecodeMode,
    costs: ForwardCosts,
    tok_s: float,
    busy_ms: float,
    weight_bytes: int | None,
    bound: Bound,
) -> None:
    cell = h100_cell(decode=decode, tok_s=tok_s, busy_ms=busy_ms, weight_bytes=weight_bytes, costs=costs)
    assert decode_pace(cell, BANDWIDTH, MATRIX).bound == bound


def test_the_figures_behind_a_bound() -> None:
    cell = h100_cell(tok_s=118, busy_ms=7.571, launches=1256)
    pace = decode_pace(cell, BANDWIDTH, MATRIX)
    assert pace.busy_s_per_step == pytest.approx(7.571e-3)
    assert pace.busy_share == pytest.approx(7.571e-3 * 118)
    assert pace.launches_per_step == 1256
    assert pace.mbu == decode_mbu(cell, BANDWIDTH) == pytest.approx(0.57, abs=0.005)
    assert pace.mfu == decode_mfu(cell, MATRIX)
    assert pace.enqueue_share == pytest.approx(0.3 / (127 / 118))


def prefill_cell(prompt_tokens: int, prefill_s: float, busy_s: float, trials: int = 1) -> CellRecord:
    times = KernelTimes(steps=2, busy_s=2 * busy_s, launches=1200, kernels=[])
    return make_cell(
        loaded=make_loaded(costs=QWEN_7B),
        trials=[make_trial(i, prompt_tokens=prompt_tokens, prefill_s=prefill_s) for i in range(trials)],
        profile=Profile(prefill=times),
    )


@pytest.mark.parametrize(
    ("prompt_tokens", "prefill_s", "busy_s", "bound"),
    [
        (2048, 0.05, 0.048, "compute"),  # 79% of the matrix rate
        (64, 0.030, 0.008, "launch"),  # the host needs as long for a short prompt
        (64, 0.0085, 0.008, "bandwidth"),  # and must still read all weights
        (2048, 0.15, 0.148, "kernel"),
    ],
)
@pytest.mark.parametrize("trials", [1, 3])
def test_the_bound_of_prefill(
    prompt_tokens: int, prefill_s: float, busy_s: float, bound: Bound, trials: int
) -> None:
    pace = prefill_pace(prefill_cell(prompt_tokens, prefill_s, busy_s, trials), BANDWIDTH, MATRIX)
    assert pace.bound == bound
    assert pace.busy_share == pytest.approx(busy_s / prefill_s)
    assert pace.launches_per_step == 600
    assert pace.enqueue_share is None


def test_decode_of_a_large_batch_is_bound_by_arithmetic() -> None:
    cell = h100_cell(tok_s=512 / 16e-3, busy_ms=15.5, workload={"batch_size": 512})
    pace = decode_pace(cell, BANDWIDTH, MATRIX)
    assert pace.mfu
    assert pace.mbu
    assert pace.mfu > pace.mbu
    assert pace.bound == "compute"


def test_without_kernel_times_the_bound_is_unknown_but_not_the_shares() -> None:
    unprofiled = h100_cell(tok_s=118)
    failed = msgspec.structs.replace(unprofiled, profile=Profile(reason="CUPTI is busy"))
    for cell in (unprofiled, failed):
        pace = decode_pace(cell, BANDWIDTH, MATRIX)
        assert pace.bound is pace.busy_share is pace.busy_s_per_step is pace.launches_per_step is None
        assert pace.mbu == pytest.approx(0.57, abs=0.005)
        assert pace.enqueue_share is not None
        assert prefill_pace(cell, BANDWIDTH, MATRIX).bound is None


def test_a_trace_without_kernels_does_not_mean_an_idle_gpu() -> None:
    pace = decode_pace(h100_cell(tok_s=118, busy_ms=0), BANDWIDTH, MATRIX)
    assert pace.bound is pace.busy_share is None


def test_without_peaks_only_an_idle_gpu_has_a_bound() -> None:
    idle, busy = h100_cell(tok_s=40, busy_ms=7.571), h100_cell(tok_s=118, busy_ms=7.571)
    assert decode_pace(idle, None, None).bound == "launch"
    assert decode_pace(busy, None, None).bound is None
    assert decode_pace(busy, BANDWIDTH, None).bound == "bandwidth"


def test_one_known_roof_does_not_decide_the_bound() -> None:
    """As with float32, whose matrix rate may not have been measured."""
    slow = h100_cell(tok_s=93, busy_ms=10.382, weight_bytes=AWQ_BYTES)
    assert decode_pace(slow, BANDWIDTH, None).bound is None
    assert decode_pace(slow, None, MATRIX).bound is None


def test_without_trials_nothing_is_known() -> None:
    cell = h100_cell(tok_s=118, busy_ms=7.571, trials=[])
    assert decode_pace(cell, BANDWIDTH, MATRIX) == Pace() == prefill_pace(cell, BANDWIDTH, MATRIX)


@given(tok_s=st.floats(1, 2000), busy_ms=st.floats(0.1, 50))
def test_all_cases_of_the_rule(tok_s: float, busy_ms: float) -> None:
    pace = decode_pace(h100_cell(tok_s=tok_s, busy_ms=busy_ms), BANDWIDTH, MATRIX)
    assert pace.busy_share is not None
    assert pace.mbu is not None
    assert 0 < pace.busy_share <= 1
    if pace.busy_share < BUSY_SHARE:
        assert pace.bound == "launch"
    else:
        assert pace.bound == ("bandwidth" if pace.mbu >= NEAR_ROOF else "kernel")
