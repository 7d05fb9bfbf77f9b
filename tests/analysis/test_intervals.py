"""Real differences are reported, and noise rarely is: comparisons with a known answer."""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from golden_text import Golden
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.analysis.intervals import (
    BATCH,
    Comparison,
    Sample,
    compare,
    compare_all,
    of_ratios,
    of_shares,
    of_two,
)
from orchestrator.analysis.verdicts import FEWEST_ROUNDS

ROUNDS = 7
NOISE = 0.01
"""Noise of one process, as the standard deviation of the logarithm."""


MakeSample = Callable[[list[float], list[float]], Sample]


def paired(speeds: list[float], references: list[float]) -> Sample:
    """Compare like rounds of one run; independent runs are compared by `of_two`."""
    return of_ratios([speed / reference for speed, reference in zip(speeds, references, strict=True)])


def simulated(make: MakeSample, effect: float, times: int, noise: float = NOISE) -> Iterator[Comparison]:
    """Comparisons of two precisions, of which one is really faster by `effect`."""
    draw = random.Random(6)
    for _ in range(times):
        speeds, references = ([math.exp(draw.gauss(0, noise)) for _ in range(ROUNDS)] for _ in range(2))
        yield compare(make([(1 + effect) * each for each in speeds], references))


@pytest.mark.parametrize("make", [paired, of_two])
@pytest.mark.parametrize("noise", [0.01, 0.05])
def test_equal_precisions_rarely_look_different(make: MakeSample, noise: float) -> None:
    verdicts = Counter(each.verdict for each in simulated(make, 0, 200, noise))
    assert verdicts["faster"] + verdicts["slower"] <= 0.05 * 200


@pytest.mark.parametrize("make", [paired, of_two])
@pytest.mark.parametrize(("effect", "verdict"), [(0.03, "faster"), (-0.03, "slower")])
def test_a_difference_of_three_percent_is_found_in_one_percent_of_noise(
    make: MakeSample, effect: float, verdict: str
) -> None:
    verdicts = Counter(each.verdict for each in simulated(make, effect, 200))
    assert verdicts[verdict] >= 0.9 * 200  # type: ignore[index]


def compare_shares(shares: list[float], references: list[float]) -> Comparison | None:
    sample = of_shares(shares, references)
    return sample and compare(sample)


def shares(draw: random.Random, divergence: float, prompts: int) -> list[float]:
    """Shares of 128 tokens before the first different one; tokens differ with probability `divergence`."""
    tokens = (int(math.log(1 - draw.random()) / math.log(1 - divergence)) for _ in range(prompts))
    return [min(each, 128) / 128 for each in tokens]


@pytest.mark.parametrize("prompts", [5, 20])
@pytest.mark.parametrize("divergence", [0.005, 0.05, 0.3])
def test_precisions_that_diverge_equally_early_rarely_look_different(prompts: int, divergence: float) -> None:
    draw = random.Random(6)
    pairs = [(shares(draw, divergence, prompts), shares(draw, divergence, prompts)) for _ in range(200)]
    verdicts = Counter(found.verdict for each in pairs if (found := compare_shares(*each)))
    assert verdicts["faster"] + verdicts["slower"] <= 0.05 * 200


def test_diverging_five_times_as_early_is_found_in_twenty_prompts() -> None:
    draw = random.Random(6)
    found = [compare_shares(shares(draw, 0.05, 20), shares(draw, 0.01, 20)) for _ in range(200)]
    assert sum(each is not None and each.verdict == "slower" for each in found) >= 0.9 * 200


def test_shares_may_be_0_and_have_no_ratio_over_0(golden: Golden) -> None:
    assert compare_shares([0.5, 0.5], [0.0, 0.0]) is None
    lost = compare_shares([0.0] * 5, [0.5] * 5)
    assert lost is not None
    assert (lost.ratio, lost.low, lost.high, lost.verdict) == (0, 0, 0, "slower")
    few = compare_shares([0.0] * 4, [0.5] * 4)
    assert few is not None
    assert few.verdict == "can't tell"
    golden(few.why)
    one_of_many = compare_shares([0.0] * 5, [0.0] * 4 + [0.5])
    assert one_of_many is not None
    assert one_of_many.verdict == "can't tell"


def test_one_round_has_no_interval_and_no_verdict() -> None:
    one = compare(of_ratios([1.5]))
    assert (one.ratio, one.rounds, one.low, one.high, one.verdict, one.half_width) == (1.5, 1, *[None] * 4)


def test_few_rounds_have_an_interval_and_no_verdict() -> None:
    few = compare(of_ratios([1.5, 1.51, 1.52, 1.53][: FEWEST_ROUNDS - 1]))
    assert few.low is not None
    assert few.verdict == "can't tell"
    assert "too few" in few.why


@pytest.mark.parametrize(
    ("ratios", "floor", "verdict", "why"),
    [
        ([1.84, 1.85, 1.83, 1.84, 1.85], 0.0, "faster", "1.84× [1.8"),
        ([0.50, 0.51, 0.50, 0.49, 0.50], 0.0, "slower", "0.50× [0.4"),
        ([1.001, 0.999, 1.002, 1.0, 0.998], 0.0, "same", "is within 2% of 1"),
        ([1.03, 1.04, 1.03, 1.04, 1.03], 0.06, "can't tell", "differed from itself by 6.0%"),
        ([0.9, 1.2, 1.1, 0.8, 1.3], 0.0, "can't tell", "includes 1"),
        ([1.01, 1.2, 1.01, 1.01, 1.01], 0.0, "can't tell", "too few for their variation"),
        ([1.5] * 5, 0.0, "faster", "[1.500, 1.500] over 5 rounds"),
    ],
)
def test_verdicts_and_their_reasons(ratios: list[float], floor: float, verdict: str, why: str) -> None:
    found = compare(of_ratios(ratios, floor))
    assert found.verdict == verdict
    assert why in found.why


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=12))
def test_an_interval_contains_its_ratio_and_is_within_the_range_of_ratios(ratios: list[float]) -> None:
    found = compare(of_ratios(ratios))
    assert found.low is not None
    assert found.high is not None
    assert min(ratios) * 0.999 <= found.low <= found.ratio * 1.001
    assert found.ratio * 0.999 <= found.high <= max(ratios) * 1.001
    assert compare(of_ratios(ratios)) == found  # the same records always give the same interval


def test_comparing_many_at_once_gives_the_same_as_one_by_one() -> None:
    draw = random.Random(1)
    samples = [
        make([draw.uniform(0.9, 1.1) for _ in range(rounds)], [draw.uniform(0.9, 1.1) for _ in range(rounds)])
        for _ in range(BATCH)
        for make in (paired, of_two)
        for rounds in (1, 3, 7)
    ]
    together = compare_all([*samples, of_ratios([1.5] * 7)])
    assert together == [*map(compare, samples), compare(of_ratios([1.5] * 7))]
