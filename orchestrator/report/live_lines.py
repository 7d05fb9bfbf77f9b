"""The memory of a watched program: a line whenever it changes, and the peak of each figure at the end."""

from collections.abc import Iterator

import click
import msgspec

from orchestrator.hardware.live_reading import LiveReading
from orchestrator.units import mib

FIELDS = {
    "NVML process": "process_bytes",
    "torch allocated": "allocated_bytes",
    "torch reserved": "reserved_bytes",
    "outside torch": "outside_torch_bytes",
}


def print_live(readings: Iterator[LiveReading], as_json: bool) -> None:
    """Print readings as they come, in MiB, or as JSON Lines, between the program's own output."""
    began_ns: int | None = None
    shown = ""
    highest = dict.fromkeys(FIELDS, 0)
    for reading in readings:
        if as_json:
            click.echo(msgspec.json.encode(reading))
            continue
        began_ns = began_ns or reading.at_ns
        for heading, field in FIELDS.items():
            highest[heading] = max(highest[heading], getattr(reading, field) or 0)
        text = _figures(reading)
        if text != shown:
            click.echo(f"{(reading.at_ns - began_ns) / 1e9:7.1f} s  {text}")
            shown = text
    if not as_json:
        peaks = (f"{heading} {mib(value or None)}" for heading, value in highest.items())
        click.echo(f"peak, MiB: {', '.join(peaks)}")


def _figures(reading: LiveReading) -> str:
    figures = (f"{heading} {mib(getattr(reading, field))}" for heading, field in FIELDS.items())
    return ", ".join(figures) + (f" ({reading.reason})" if reading.reason else "")
