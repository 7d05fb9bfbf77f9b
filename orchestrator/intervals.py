"""What a ratio is worth: its interval over rounds, and whether it tells a difference from noise.

A process is one sample of everything that varies between processes: clocks, memory layout, which core of
the host. So the unit of replication is the round, in which each precision runs once in a fresh process, and a
ratio is taken round by round, which cancels what drifts slower than a round. The interval is a 95 % bootstrap
of the geometric mean over rounds (Efron and Tibshirani 1993, percentile method, by scipy).

Of few rounds a bootstrap interval is too narrow: it leaves the truth out more often than one time in twenty.
A verdict therefore also wants Student's t on the logarithms to agree, at 2 %.

Of tokens the prompts are the sample: greedy decode gives the same ones in every process.
"""

import math
from collections.abc import Callable
from statistics import fmean
from typing import Literal, NamedTuple

import msgspec

from orchestrator.units import percent, ratio

Verdict = Literal["faster", "slower", "same", "can't tell"]

CONFIDENCE = 0.95
T_LEVEL = 0.02
FEWEST_ROUNDS = 5
"""Rounds, or prompts, from which on there are verdicts."""
SAME = 0.02
"""An interval within this of 1 says that two precisions are the same for all who choose between them."""
RESAMPLES = 9999


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """A ratio over rounds; above 1 is faster."""

    ratio: float
    rounds: int
    """How many values it rests on: rounds, or prompts where it is of tokens."""
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


def compare_shares(shares: list[float], references: list[float]) -> Comparison | None:
    """The ratio of two mean shares, each with a value a prompt, in the same order; None over a mean of 0.

    A share may be 0, which has no logarithm: what varies is by how much a prompt differs, in means of the
    reference.
    """
    mean = fmean(references)
    if not mean:
        return None
    changes = [(share - reference) / mean for share, reference in zip(shares, references, strict=True)]
    return _compared([changes], 0.0, _PROMPTS)


class _Sample(NamedTuple):
    """What the values of a sample are of, and how their mean becomes a ratio."""

    noun: str
    as_ratio: Callable[[float], float]


_ROUNDS = _Sample("rounds", math.exp)
_PROMPTS = _Sample("prompts", lambda change: max(0.0, 1 + change))


def _compared(samples: list[list[float]], noise_floor: float, of: _Sample = _ROUNDS) -> Comparison:
    """Of one sample its mean, of two the difference of their means."""
    middle = of.as_ratio(_statistic(*map(fmean, samples)))
    size = min(map(len, samples))
    if size < 2:
        return Comparison(ratio=middle, rounds=size)
    low, high = map(of.as_ratio, _interval(samples))
    verdict, why = _verdict(middle, low, high, samples, noise_floor, of.noun)
    return Comparison(ratio=middle, rounds=size, low=low, high=high, verdict=verdict, why=why)


def _statistic(mean: float, reference: float = 0.0) -> float:
    return mean - reference


def _interval(logs: list[list[float]]) -> tuple[float, float]:
    import numpy  # a second to import with scipy, and only runs of several rounds need them
    from scipy.stats import bootstrap

    if _never_varies(logs):
        mean = _statistic(*map(fmean, logs))
        return mean, mean
    found = bootstrap(
        logs,
        lambda *samples, axis: _statistic(*(numpy.mean(sample, axis=axis) for sample in samples)),
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=0,  # the same records give the same interval
    ).confidence_interval
    return float(found.low), float(found.high)


def _verdict(
    middle: float, low: float, high: float, samples: list[list[float]], noise_floor: float, noun: str
) -> tuple[Verdict, str]:
    size = min(map(len, samples))
    span = f"[{low:.3f}, {high:.3f}] over {size} {noun}"
    if size < FEWEST_ROUNDS:
        return "can't tell", f"{size} {noun} are too few, {FEWEST_ROUNDS} the least"
    if low >= 1 / (1 + SAME) and high <= 1 + SAME:
        return "same", f"{span} lies within {percent(SAME)} of 1"
    if abs(middle - 1) <= noise_floor:
        return "can't tell", f"FP16 differed from itself by {noise_floor:.1%}, and this by no more"
    if low <= 1 <= high:
        return "can't tell", f"{span} holds 1"
    if not _t_agrees(samples):
        return "can't tell", f"{span} does not hold 1, but so few {noun} that vary so much prove nothing"
    return ("faster" if middle > 1 else "slower"), f"{ratio(middle)} {span}"


def _t_agrees(logs: list[list[float]]) -> bool:
    """Student's test of one sample, Welch's of two."""
    from scipy.stats import ttest_1samp, ttest_ind

    if _never_varies(logs):
        return True
    test = ttest_1samp(logs[0], 0.0) if len(logs) == 1 else ttest_ind(*logs, equal_var=False)
    return bool(test.pvalue < T_LEVEL)


def _never_varies(logs: list[list[float]]) -> bool:
    return all(max(sample) - min(sample) < 1e-9 for sample in logs)
