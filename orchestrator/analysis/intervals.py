"""How reliable a ratio is: its interval over rounds, and whether it is distinguishable from noise.

A process is one sample of everything that varies between processes: clocks, memory layout, the host core it
runs on. So the unit of replication is the round, in which each precision runs once in a fresh process, and a
ratio is taken round by round, which cancels drift slower than a round. The interval is a 95% bootstrap of
the geometric mean over rounds (Efron and Tibshirani 1993, percentile method, by scipy).

For tokens the sample is the prompts: greedy decode gives the same tokens in every process.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from operator import sub
from statistics import fmean
from typing import Any, NamedTuple

import msgspec

from orchestrator.analysis.verdicts import Verdict, verdict_on

CONFIDENCE = 0.95
RESAMPLES = 9999
BATCH = 100
"""Ratios bootstrapped together: a scipy call takes milliseconds, and each ratio some megabytes."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """A ratio over rounds; above 1 is faster."""

    ratio: float
    rounds: int
    """The number of values behind it: rounds, or prompts for figures about tokens."""
    low: float | None = None
    """Ends of the 95% interval; None after one round."""
    high: float | None = None
    verdict: Verdict | None = None
    """None after one round."""
    why: str = ""
    """The reason for the verdict, in a line."""

    @property
    def half_width(self) -> float | None:
        """Half the interval, relative to the ratio."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2 / self.ratio


class Sample(NamedTuple):
    """The values behind a ratio: one list, or two whose means are compared.

    `as_ratio` converts the mean of the one, or the difference of the two means, into the ratio.
    """

    sides: list[list[float]]
    noise_floor: float = 0.0
    """A change smaller than this isn't called a difference."""
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
    """One ratio per round. `noise_floor` is how far FP16 differed from itself."""
    return Sample([[math.log(each) for each in ratios]], noise_floor)


def of_two(values: list[float], references: list[float]) -> Sample:
    """A figure of two independent runs, one value per round."""
    return Sample([[math.log(each) for each in side] for side in (values, references)])


def of_shares(shares: list[float], references: list[float]) -> Sample | None:
    """Two lists of shares, one value per prompt in the same order; None if the reference's mean is 0.

    A share may be 0, which has no logarithm, so the sample is each prompt's difference, relative to the
    reference's mean.
    """
    mean = fmean(references)
    if not mean:
        return None
    changes = [(share - reference) / mean for share, reference in zip(shares, references, strict=True)]
    return Sample([changes], noun="prompts", as_ratio=lambda change: max(0.0, 1 + change))


def compare(sample: Sample) -> Comparison:
    """The ratio of a sample, with interval and verdict."""
    (found,) = compare_all([sample])
    return found


def compare_all(samples: Sequence[Sample]) -> list[Comparison]:
    """The same for many samples; those of one size are bootstrapped together."""
    alike: defaultdict[object, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        alike[sample.sizes, sample.varies].append(index)
    found: dict[int, Comparison] = {}
    for indices in alike.values():
        for start in range(0, len(indices), BATCH):
            batch = indices[start : start + BATCH]
            found.update(zip(batch, _compare_alike([samples[index] for index in batch]), strict=True))
    return [found[index] for index in range(len(samples))]


def _compare_alike(samples: list[Sample]) -> Iterator[Comparison]:
    """The same for samples of one size, of which either all vary or none does."""
    size = min(samples[0].sizes)
    if size < 2:
        yield from (Comparison(ratio=sample.ratio, rounds=size) for sample in samples)
        return
    drawn = _draw(samples) if samples[0].varies else [_Drawn(each.mean, each.mean, 0.0) for each in samples]
    for sample, (low, high, p_value) in zip(samples, drawn, strict=True):
        ends = {"low": sample.as_ratio(low), "high": sample.as_ratio(high)}
        verdict, why = verdict_on(
            sample.ratio, size, sample.noun, **ends, p_value=p_value, noise_floor=sample.noise_floor
        )
        yield Comparison(ratio=sample.ratio, rounds=size, **ends, verdict=verdict, why=why)


class _Drawn(NamedTuple):
    """Ends of a bootstrap interval, and the p-value of the t-test."""

    low: float
    high: float
    p_value: float


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
