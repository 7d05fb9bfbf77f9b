"""What a ratio is worth: its interval over rounds, and whether it tells a difference from noise.

A process is one sample of everything that varies between processes: clocks, memory layout, which core of
the host. So the unit of replication is the round, in which each precision runs once in a fresh process, and a
ratio is taken round by round, which cancels what drifts slower than a round. The interval is a 95 % bootstrap
of the geometric mean over rounds (Efron and Tibshirani 1993, percentile method). It is scipy's `bootstrap` to
the last draw, which takes milliseconds for each ratio; a table of thousands has one set of draws for all.

Of few rounds a bootstrap interval is too narrow: it leaves the truth out more often than one time in twenty.
A verdict therefore also wants Student's t on the logarithms to agree, at 2 %.
"""

import math
from functools import lru_cache, reduce
from operator import sub
from statistics import fmean, variance
from typing import TYPE_CHECKING, Literal

import msgspec

from orchestrator.units import percent, ratio

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray

Verdict = Literal["faster", "slower", "same", "can't tell"]

CONFIDENCE = 0.95
T_LEVEL = 0.02
FEWEST_ROUNDS = 5
"""Rounds from which on there are verdicts."""
SAME = 0.02
"""An interval within this of 1 says that two precisions are the same for all who choose between them."""
RESAMPLES = 9999


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """A ratio over rounds; above 1 is faster."""

    ratio: float
    rounds: int
    low: float | None = None
    """Ends of the 95 % interval; None of one round."""
    high: float | None = None
    verdict: Verdict | None = None
    """None of one round."""
    why: str = ""
    """The verdict's reason in a line."""

    @property
    def half_width(self) -> float | None:
        """Half the interval, relative to the ratio."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2 / self.ratio


def compare(ratios: list[float], noise_floor: float = 0.0) -> Comparison:
    """What these ratios, one a round, tell together.

    `noise_floor` is by how much FP16 differed from itself; nothing below it is called a difference.
    """
    return _compared([[math.log(each) for each in ratios]], noise_floor)


def compare_unpaired(values: list[float], references: list[float]) -> Comparison:
    """The ratio of two figures from runs apart from each other, each with a value a round."""
    return _compared([[math.log(each) for each in sample] for sample in (values, references)], 0.0)


def _compared(logs: list[list[float]], noise_floor: float) -> Comparison:
    """Of one sample of logarithms its mean, of two the difference of their means."""
    middle = math.exp(reduce(sub, map(fmean, logs)))
    rounds = min(map(len, logs))
    if rounds < 2:
        return Comparison(ratio=middle, rounds=rounds)
    low, high = (math.exp(end) for end in _interval(logs))
    verdict, why = _verdict(middle, low, high, logs, noise_floor)
    return Comparison(ratio=middle, rounds=rounds, low=low, high=high, verdict=verdict, why=why)


def _interval(logs: list[list[float]]) -> tuple[float, float]:
    if _never_varies(logs):
        mean = reduce(sub, map(fmean, logs))
        return mean, mean
    import numpy  # takes a while to import, and only runs of several rounds need it

    weights = _resample_weights(tuple(map(len, logs)))
    means = (weight @ sample for weight, sample in zip(weights, logs, strict=True))
    tail = (1 - CONFIDENCE) / 2
    low, high = numpy.quantile(reduce(sub, means), [tail, 1 - tail])
    return float(low), float(high)


@lru_cache(maxsize=4)
def _resample_weights(sizes: tuple[int, ...]) -> list["NDArray[float64]"]:
    """For a sample of each size, `RESAMPLES` rows that say what part of the mean each value is."""
    import numpy

    draws = numpy.random.default_rng(0)  # the same records give the same interval
    weights = []
    for size in sizes:
        drawn = draws.integers(0, size, (RESAMPLES, size)) + size * numpy.arange(RESAMPLES)[:, None]
        weights.append(numpy.bincount(drawn.ravel(), minlength=RESAMPLES * size).reshape(-1, size) / size)
    return weights


def _verdict(
    middle: float, low: float, high: float, logs: list[list[float]], noise_floor: float
) -> tuple[Verdict, str]:
    rounds = min(map(len, logs))
    span = f"[{low:.3f}, {high:.3f}] over {rounds} rounds"
    if rounds < FEWEST_ROUNDS:
        return "can't tell", f"{rounds} rounds are too few, {FEWEST_ROUNDS} the least"
    if low >= 1 / (1 + SAME) and high <= 1 + SAME:
        return "same", f"{span} lies within {percent(SAME)} of 1"
    if abs(middle - 1) <= noise_floor:
        return "can't tell", f"FP16 differed from itself by {noise_floor:.1%}, and this by no more"
    if low <= 1 <= high:
        return "can't tell", f"{span} holds 1"
    if not _t_agrees(logs):
        return "can't tell", f"{span} does not hold 1, but so few rounds that vary so much prove nothing"
    return ("faster" if middle > 1 else "slower"), f"{ratio(middle)} {span}"


def _t_agrees(logs: list[list[float]]) -> bool:
    """Welch's t-test of two samples; of one its formula is Student's."""
    if _never_varies(logs):
        return True
    from scipy.special import stdtr

    errors = [variance(sample) / len(sample) for sample in logs]
    freedom = sum(errors) ** 2 / sum(
        error**2 / (len(sample) - 1) for error, sample in zip(errors, logs, strict=True)
    )
    t = abs(reduce(sub, map(fmean, logs))) / math.sqrt(sum(errors))
    return bool(2 * stdtr(freedom, -t) < T_LEVEL)


def _never_varies(logs: list[list[float]]) -> bool:
    return all(max(sample) - min(sample) < 1e-9 for sample in logs)
