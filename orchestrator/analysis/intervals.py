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
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from operator import sub
from statistics import fmean
from typing import Any, Literal, NamedTuple

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
AT_ONCE = 100
"""Ratios drawn anew together: a call of scipy takes milliseconds, and each ratio some megabytes."""


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


class Sample(NamedTuple):
    """What a ratio rests on: values whose mean is it, or two lists whose means differ by it."""

    sides: list[list[float]]
    noise_floor: float = 0.0
    """Nothing below it is called a difference."""
    noun: str = "rounds"
    as_ratio: Callable[[float], float] = math.exp

    @property
    def mean(self) -> float:
        return reduce(sub, map(fmean, self.sides))

    @property
    def ratio(self) -> float:
        return self.as_ratio(self.mean)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(map(len, self.sides))

    @property
    def varies(self) -> bool:
        return any(max(side) - min(side) > 1e-9 for side in self.sides)


def of_ratios(ratios: list[float], noise_floor: float = 0.0) -> Sample:
    """Ratios, one a round. `noise_floor` is by how much FP16 differed from itself."""
    return Sample([[math.log(each) for each in ratios]], noise_floor)


def of_two(values: list[float], references: list[float]) -> Sample:
    """Two figures from runs apart from each other, each with a value a round."""
    return Sample([[math.log(each) for each in side] for side in (values, references)])


def of_shares(shares: list[float], references: list[float]) -> Sample | None:
    """Two mean shares, each with a value a prompt, in the same order; None over a mean of 0.

    A share may be 0, which has no logarithm: what varies is by how much a prompt differs, in means of the
    reference.
    """
    mean = fmean(references)
    if not mean:
        return None
    changes = [(share - reference) / mean for share, reference in zip(shares, references, strict=True)]
    return Sample([changes], noun="prompts", as_ratio=lambda change: max(0.0, 1 + change))


def compare(sample: Sample) -> Comparison:
    """What a sample tells."""
    (found,) = compare_all([sample])
    return found


def compare_all(samples: Sequence[Sample]) -> list[Comparison]:
    """What each of these tells."""
    alike: defaultdict[object, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        alike[sample.sizes, sample.varies].append(index)
    found: dict[int, Comparison] = {}
    for indices in alike.values():
        for start in range(0, len(indices), AT_ONCE):
            some = indices[start : start + AT_ONCE]
            found.update(zip(some, _compare_alike([samples[index] for index in some]), strict=True))
    return [found[index] for index in range(len(samples))]


def _compare_alike(samples: list[Sample]) -> Iterator[Comparison]:
    """The same of samples of one size, all of which vary or none."""
    size = min(samples[0].sizes)
    if size < 2:
        yield from (Comparison(ratio=sample.ratio, rounds=size) for sample in samples)
        return
    drawn = _draw(samples) if samples[0].varies else [_Drawn(each.mean, each.mean, 0.0) for each in samples]
    for sample, (low, high, chance) in zip(samples, drawn, strict=True):
        ends = {"low": sample.as_ratio(low), "high": sample.as_ratio(high)}
        verdict, why = _verdict(sample, **ends, chance=chance)
        yield Comparison(ratio=sample.ratio, rounds=size, **ends, verdict=verdict, why=why)


class _Drawn(NamedTuple):
    """Ends of a bootstrap interval, and the chance of such a t where there is no difference."""

    low: float
    high: float
    chance: float


def _draw(samples: list[Sample]) -> list[_Drawn]:
    import numpy  # a second to import with scipy, and only runs of several rounds need them
    from scipy.stats import bootstrap, ttest_1samp, ttest_ind

    def statistic(*sides: Any, axis: int) -> Any:
        return reduce(sub, (numpy.mean(side, axis=axis) for side in sides))

    sides = [numpy.array(side) for side in zip(*(sample.sides for sample in samples), strict=True)]
    interval = bootstrap(
        sides,
        statistic,
        axis=-1,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=0,  # the same records give the same interval
    ).confidence_interval
    one = len(sides) == 1
    test = ttest_1samp(*sides, 0.0, axis=-1) if one else ttest_ind(*sides, axis=-1, equal_var=False)
    found = zip(interval.low, interval.high, test.pvalue, strict=True)
    return [_Drawn(*map(float, each)) for each in found]


def _verdict(sample: Sample, low: float, high: float, chance: float) -> tuple[Verdict, str]:
    middle, size, noun = sample.ratio, min(sample.sizes), sample.noun
    span = f"[{low:.3f}, {high:.3f}] over {size} {noun}"
    if size < FEWEST_ROUNDS:
        return "can't tell", f"{size} {noun} are too few, {FEWEST_ROUNDS} the least"
    if low >= 1 / (1 + SAME) and high <= 1 + SAME:
        return "same", f"{span} lies within {percent(SAME)} of 1"
    if abs(middle - 1) <= sample.noise_floor:
        return "can't tell", f"FP16 differed from itself by {sample.noise_floor:.1%}, and this by no more"
    if low <= 1 <= high:
        return "can't tell", f"{span} holds 1"
    if chance >= T_LEVEL:
        return "can't tell", f"{span} does not hold 1, but so few {noun} that vary so much prove nothing"
    return ("faster" if middle > 1 else "slower"), f"{ratio(middle)} {span}"
