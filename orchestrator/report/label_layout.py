"""Where names stand in a picture: as near to what they name as can be, and none over another."""

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import NamedTuple

LETTER = 0.052
"""Mean width of small text, in inches."""


class Stretch(NamedTuple):
    """Something that lasts, with its name; where it lies on the axis of time, in inches."""

    text: str
    start: float
    end: float

    @property
    def length(self) -> float:
        return self.end - self.start


class Name(NamedTuple):
    """A text that wants to stand at a place along one direction, in inches, and the room it takes there."""

    text: str
    wanted: float
    room: float


def placed(stretches: Iterable[Stretch], width: float) -> Iterator[tuple[Name, float]]:
    """Names and where they stand. Where there is no room for all, the longest stretches have theirs."""
    shown = sorted(stretches, key=lambda stretch: stretch.length, reverse=True)
    while sum(room_of(stretch.text) for stretch in shown) > width:
        shown.pop()
    shown.sort(key=lambda stretch: stretch.start)
    names = [Name(one.text, (one.start + one.end) / 2, room_of(one.text)) for one in shown]
    return zip(names, spread(names, 0.0, width), strict=True)


def room_of(text: str) -> float:
    return LETTER * (len(text) + 3)


def spread(names: list[Name], low: float, high: float) -> list[float]:
    """Where names stand, as near as can be to where they want to, in their order, none over another.

    Least squares: with the room before each taken off, places may only rise, so that neighbours who
    would cross share the mean of what they want (isotonic regression by pooling).
    """
    rooms = [name.room for name in names]
    before = [total - room / 2 for total, room in zip(accumulate(rooms), rooms, strict=True)]
    pools: list[list[float]] = []
    for name, offset in zip(names, before, strict=True):
        pools.append([name.wanted - offset])
        while len(pools) > 1 and _mean(pools[-2]) > _mean(pools[-1]):
            crossing = pools.pop()
            pools[-1] += crossing
    starts = [_mean(pool) for pool in pools for _ in pool]
    latest = max(low, high - sum(rooms))
    return [min(max(start, low), latest) + offset for start, offset in zip(starts, before, strict=True)]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
