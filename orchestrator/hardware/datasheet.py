"""NVIDIA's published figures for its GPUs, to compare with the measured ones. Bounds use measured figures."""

from functools import cache
from pathlib import Path

import msgspec

from schemas.record import Datasheet

DATASHEETS = Path(__file__).with_name("datasheets.toml")
TERA = 1e12


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    source: str
    read_tb_per_s: float
    tflop_per_s: dict[str, float]


def find_datasheet(gpu_name: str) -> Datasheet | None:
    """The published figures of a GPU, by the driver's name for it; None if it is not in the table."""
    entry = _entries().get(gpu_name)
    if entry is None:
        return None
    return Datasheet(
        source=entry.source,
        read_bytes_per_s=entry.read_tb_per_s * TERA,
        matrix_flop_per_s={dtype: rate * TERA for dtype, rate in entry.tflop_per_s.items()},
    )


@cache
def _entries() -> dict[str, _Entry]:
    return msgspec.toml.decode(DATASHEETS.read_bytes(), type=dict[str, _Entry])
