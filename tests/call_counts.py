"""How often code calls functions: a measure of work that no machine's speed affects."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import unwrap
from types import FrameType
from typing import Any


@contextmanager
def profiled(on_event: Callable[[FrameType, str, Any], None]) -> Iterator[None]:
    """Call `on_event` for every call and return in this thread."""
    sys.setprofile(on_event)
    try:
        yield
    finally:
        sys.setprofile(None)


def count_calls(task: Callable[[], object]) -> int:
    """Number of calls that a task makes, to functions in Python and in C."""
    calls = 0

    def count(_frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    with profiled(count):
        task()
    return calls


@contextmanager
def calls_by_name(*functions: Callable[..., object]) -> Iterator[Counter[str]]:
    """Calls of each of these functions, under any name that a module imports it by."""
    names = {unwrap(function).__code__: function.__name__ for function in functions}
    counts: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _argument: Any) -> None:
        if event == "call" and (name := names.get(frame.f_code)):
            counts[name] += 1

    with profiled(count):
        yield counts
