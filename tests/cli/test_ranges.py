"""The range syntax of `--batch-size`, `--prompt-tokens`, `--depth` and `--new-tokens`."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cli.ranges import MOST_VALUES, parse_range


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("128", [128]),
        ("128,512", [128, 512]),
        ("512,128,512", [512, 128]),
        ("128-2048*2", [128, 256, 512, 1024, 2048]),
        ("100-1000*3", [100, 300, 900]),
        ("0-4096+1024", [0, 1024, 2048, 3072, 4096]),
        ("3-5", [3, 4, 5]),
        ("7-7*1", [7]),
        ("0, 16-64*2", [0, 16, 32, 64]),
    ],
)
def test_ranges(text: str, values: list[int]) -> None:
    assert parse_range(text) == values


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "Write a number"),
        ("many", "Write a number"),
        ("-5", "Write a number"),
        ("1-2-3", "Write a number"),
        ("1,,2", "Write a number"),
        ("8-4", "never reaches 4"),
        ("1-9*1", "never reaches 9"),
        ("0-9*2", "never reaches 9"),
        ("1-9+0", "never reaches 9"),
        ("1-5000", "more than 100 values"),
    ],
)
def test_what_is_no_range(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_range(text)


@given(st.integers(0, 1000), st.integers(0, 50), st.integers(1, 100))
def test_a_sum_range_stays_within_its_ends(first: int, steps: int, by: int) -> None:
    values = parse_range(f"{first}-{first + steps * by}+{by}")
    assert values == list(range(first, first + steps * by + 1, by))
    assert len(values) <= MOST_VALUES
