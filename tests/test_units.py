"""Figures as people read them: significant digits only, and a dash, never a zero, for unknown values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.units import ABSENT, duration, mib, milliseconds, percent, rate, ratio


@pytest.mark.parametrize("show", [mib, milliseconds, percent, rate, ratio])
def test_unknown_is_a_dash_and_zero_is_a_number(show: object) -> None:
    assert callable(show)
    assert show(None) == ABSENT
    assert "0" in show(0.0)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (mib(988_097_536), "942"),
        (mib(15_272 * 2**20), "15,272"),
        (milliseconds(0.0123456), "12.3"),
        (milliseconds(0.09999), "100.0"),
        (milliseconds(1.2344), "1,234"),
        (rate(48.25), "48.2"),
        (rate(1234.4), "1,234"),
        (ratio(0.5), "0.50×"),
        (ratio(1.0049), "1.00×"),
        (ratio(99.994), "99.99×"),
        (ratio(99.996), "100×"),
        (ratio(1363.5), "1,364×"),
        (percent(0.361), "36%"),
        (percent(-1.0), "-100%"),
    ],
)
def test_figures(shown: str, expected: str) -> None:
    assert shown == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.4, "0 s"),
        (8.2, "8 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 0 min"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


@given(st.floats(min_value=0, max_value=1e7))
def test_a_duration_is_rounded_by_less_than_its_last_unit(seconds: float) -> None:
    words = duration(seconds).split()
    unit_s = {"s": 1, "min": 60, "h": 3600}
    shown_s = sum(int(number) * unit_s[unit] for number, unit in zip(words[::2], words[1::2], strict=True))
    assert abs(shown_s - seconds) <= (0.5 if words[-1] == "s" else 60)
    assert "60 s" not in duration(seconds)
    assert "60 min" not in duration(seconds)
