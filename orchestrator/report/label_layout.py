"""Layout of labels in a plot: as close as possible to what they label, without overlap."""

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import NamedTuple

LETTER = 0.052
"""Mean width of small text, in inches."""


class Interval(NamedTuple):
    """A labeled interval on the time axis, in inches."""

    text: str
    start: float
    end: float

    @property
    def length(self) -> float:
        return self.end - self.start


class Label(NamedTuple):
    """A text, its preferred position along one direction, and the space it takes there, in inches."""

    text: str
    preferred: float
    room: float


def placed(intervals: Iterable[Interval], width: float) -> Iterator[tuple[Label, float]]:
    """Labels and their positions. If there is no space for all, the longest intervals are labeled."""
    shown = sorted(intervals, key=lambda interval: interval.length, reverse=True)
    while sum(room_of(interval.text) for interval in shown) > width:
        shown.pop()
    shown.sort(key=lambda interval: interval.start)
    labels = [Label(each.text, (each.start + each.end) / 2, room_of(each.text)) for each in shown]
    return zip(labels, spread(labels, 0.0, width), strict=True)


def room_of(text: str) -> float:
    """The width of a label with its margins, in inches."""
    return LETTER * (len(text) + 3)


def spread(labels: list[Label], low: float, high: float) -> list[float]:
    """Positions of labels, as close as possible to the preferred ones, in order and without overlap.

    Least squares: after subtracting the space before each label, positions must be non-decreasing, so labels
    that would cross share the mean of their preferred positions (isotonic regression by pooling).
    """
    rooms = [label.room for label in labels]
    before = [total - room / 2 for total, room in zip(accumulate(rooms), rooms, strict=True)]
    pools: list[list[float]] = []
    for label, offset in zip(labels, before, strict=True):
        pools.append([label.preferred - offset])
        while len(pools) > 1 and _mean(pools[-2]) > _mean(pools[-1]):
            crossing = pools.pop()
            pools[-1] += crossing
    starts = [_mean(pool) for pool in pools for _ in pool]
    latest = max(low, high - sum(rooms))
    return [min(max(start, low), latest) + offset for start, offset in zip(starts, before, strict=True)]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
