"""The range syntax of `--batch-size`, `--prompt-tokens`, `--depth` and `--new-tokens`."""

import pytest
from golden_text import Golden
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


INVALID = ["", "many", "-5", "1-2-3", "1,,2", "8-4", "1-9*1", "0-9*2", "1-9+0", f"1-{MOST_VALUES + 1}"]


def test_invalid_ranges(golden: Golden) -> None:
    for text in INVALID:
        with pytest.raises(ValueError, match=r"\w") as caught:
            parse_range(text)
        golden(f"{text}: {caught.value}")


@given(st.integers(0, 1000), st.integers(0, 50), st.integers(1, 100))
def test_an_additive_range_never_exceeds_its_end(first: int, steps: int, by: int) -> None:
    values = parse_range(f"{first}-{first + steps * by}+{by}")
    assert values == list(range(first, first + steps * by + 1, by))
    assert len(values) <= MOST_VALUES
