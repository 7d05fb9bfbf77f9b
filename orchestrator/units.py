"""Figures formatted for display: the only module that rounds numbers."""

ABSENT = "–"
"""Shown for unknown figures; a zero would be a measurement."""


def mib(value_bytes: float | None) -> str:
    """Bytes in MiB (2**20), as nvidia-smi counts."""
    return ABSENT if value_bytes is None else f"{value_bytes / 2**20:,.0f}"


def tenths_mib(value_bytes: float | None) -> str:
    """Bytes in MiB with one decimal, for figures that are to be added up."""
    return ABSENT if value_bytes is None else f"{value_bytes / 2**20:,.1f}"


def milliseconds(value_s: float | None) -> str:
    """Seconds in milliseconds, with no more digits than a microsecond timer justifies."""
    if value_s is None:
        return ABSENT
    value_ms = value_s * 1e3
    return f"{value_ms:,.0f}" if value_ms >= 100 else f"{value_ms:.1f}"


def rate(value_per_s: float | None) -> str:
    """Tokens per second."""
    if value_per_s is None:
        return ABSENT
    return f"{value_per_s:,.0f}" if value_per_s >= 1000 else f"{value_per_s:.1f}"


def ratio(value: float | None) -> str:
    """With two decimals below 100, and none from there."""
    if value is None:
        return ABSENT
    return f"{value:,.0f}×" if round(value, 2) >= 100 else f"{value:.2f}×"


def percent(value: float | None) -> str:
    """A share as a whole number of percent."""
    return ABSENT if value is None else f"{value * 100:.0f}%"


def counted(count: int, noun: str) -> str:
    """`1 trial`, `2 trials`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def duration(value_s: float) -> str:
    """Seconds in the units that people use: `8 s`, `3 min 20 s`, `2 h 5 min`."""
    seconds = round(value_s)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"
