"""Ranges of counts as llama-bench writes them: `128`, `128,512`, `128-2048*2`, `0-4096+1024`."""

import re
from collections.abc import Iterator

_RANGE = re.compile(r"(?P<first>\d+)(?:-(?P<last>\d+)(?:(?P<how>[*+])(?P<by>\d+))?)?")

MOST_VALUES = 100


def parse_range(text: str) -> list[int]:
    """The counts that `text` lists, without duplicates, in its order.

    Commas separate values and ranges. `first-last*by` multiplies, `first-last+by` adds, `first-last` adds 1.
    Raises ValueError if it is none of these, or lists more than a hundred values.
    """
    values = dict.fromkeys(value for part in text.split(",") for value in _part(part.strip()))
    return list(values)


def _part(text: str) -> Iterator[int]:
    match = _RANGE.fullmatch(text)
    if match is None:
        raise ValueError("Write numbers, FIRST-LAST*FACTOR or FIRST-LAST+STEP, separated by commas")
    value, by = int(match["first"]), int(match["by"] or 1)
    last = int(match["last"] or value)
    grows = by > 0 if match["how"] != "*" else by > 1 and value > 0
    if last < value or (last > value and not grows):
        raise ValueError(f"It starts at {value} and never reaches {last}")
    for _ in range(MOST_VALUES):
        yield value
        value = value * by if match["how"] == "*" else value + by
        if not grows or value > last:
            return
    raise ValueError(f"It lists more than {MOST_VALUES} values")
