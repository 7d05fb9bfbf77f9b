"""A difference is reported when it is one, and seldom when it is none: comparisons of known truth."""

import math
import random
from collections import Counter
from collections.abc import Iterator
from functools import reduce
from operator import sub
from typing import Any

import numpy
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import bootstrap, ttest_1samp, ttest_ind

from orchestrator.intervals import (
    FEWEST_ROUNDS,
    RESAMPLES,
    T_LEVEL,
    Comparison,
    _t_agrees,
    compare,
    compare_unpaired,
)

ROUNDS = 7
NOISE = 0.01
"""Of one process, as a deviation of its logarithm."""


def simulated(effect: float, times: int, noise: float = NOISE) -> Iterator[Comparison]:
    """Comparisons of two precisions of which one is truly faster by `effect`."""
    draw = random.Random(6)
    for _ in range(times):
        speeds = [math.exp(draw.gauss(0, noise)) / math.exp(draw.gauss(0, noise)) for _ in range(ROUNDS)]
        yield compare([(1 + effect) * each for each in speeds])


@pytest.mark.parametrize("noise", [0.01, 0.05])
def test_the_same_twice_seldom_looks_different(noise: float) -> None:
    verdicts = Counter(each.verdict for each in simulated(0, 200, noise))
    assert verdicts["faster"] + verdicts["slower"] <= 0.05 * 200


@pytest.mark.parametrize(("effect", "verdict"), [(0.03, "faster"), (-0.03, "slower")])
def test_three_percent_are_found_in_one_percent_of_noise(effect: float, verdict: str) -> None:
    verdicts = Counter(each.verdict for each in simulated(effect, 200))
    assert verdicts[verdict] >= 0.9 * 200  # type: ignore[index]


def test_one_round_has_no_interval_and_no_verdict() -> None:
    one = compare([1.5])
    assert (one.ratio, one.rounds, one.low, one.high, one.verdict, one.half_width) == (1.5, 1, *[None] * 4)


def test_few_rounds_have_an_interval_and_no_verdict() -> None:
    few = compare([1.5, 1.51, 1.52, 1.53][: FEWEST_ROUNDS - 1])
    assert few.low is not None
    assert few.verdict == "can't tell"
    assert "too few" in few.why


@pytest.mark.parametrize(
    ("ratios", "floor", "verdict", "why"),
    [
        ([1.84, 1.85, 1.83, 1.84, 1.85], 0.0, "faster", "1.84× [1.8"),
        ([0.50, 0.51, 0.50, 0.49, 0.50], 0.0, "slower", "0.50× [0.4"),
        ([1.001, 0.999, 1.002, 1.0, 0.998], 0.0, "same", "lies within 2% of 1"),
        ([1.03, 1.04, 1.03, 1.04, 1.03], 0.06, "can't tell", "differed from itself by 6.0%"),
        ([0.9, 1.2, 1.1, 0.8, 1.3], 0.0, "can't tell", "holds 1"),
        ([1.01, 1.2, 1.01, 1.01, 1.01], 0.0, "can't tell", "prove nothing"),
        ([1.5] * 5, 0.0, "faster", "[1.500, 1.500] over 5 rounds"),
    ],
)
def test_verdicts_and_their_reasons(ratios: list[float], floor: float, verdict: str, why: str) -> None:
    found = compare(ratios, floor)
    assert found.verdict == verdict
    assert why in found.why


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=12))
def test_an_interval_lies_around_its_ratio_and_within_its_ratios(ratios: list[float]) -> None:
    found = compare(ratios)
    assert found.low is not None
    assert found.high is not None
    assert min(ratios) * 0.999 <= found.low <= found.ratio * 1.001
    assert found.ratio * 0.999 <= found.high <= max(ratios) * 1.001
    assert compare(ratios) == found  # the same records always give the same interval


@given(st.lists(st.lists(st.floats(0.9, 1.1), min_size=5, max_size=9), min_size=1, max_size=2))
def test_the_interval_is_that_of_scipys_bootstrap(samples: list[list[float]]) -> None:
    found = compare(*samples) if len(samples) == 1 else compare_unpaired(*samples)
    assume(found.low != found.high)

    def statistic(*logs: Any, axis: int) -> Any:
        return reduce(sub, (numpy.mean(each, axis=axis) for each in logs))

    known = bootstrap(
        [numpy.log(each) for each in samples], statistic, n_resamples=RESAMPLES, method="percentile", rng=0
    ).confidence_interval
    assert (math.log(found.low or 0), math.log(found.high or 0)) == pytest.approx(tuple(known), abs=1e-12)


@pytest.mark.parametrize("effect", [0.0, 0.005, 0.01, 0.02])
def test_the_test_is_scipys(effect: float) -> None:
    draw = random.Random(7)
    for _ in range(50):
        logs = [[draw.gauss(mean, NOISE) for _ in range(draw.randint(5, 9))] for mean in (effect, 0.0)]
        assert _t_agrees(logs[:1]) == (ttest_1samp(logs[0], 0).pvalue < T_LEVEL)
        assert _t_agrees(logs) == (ttest_ind(*logs, equal_var=False).pvalue < T_LEVEL)
