"""What the device reached, as every row is held against it."""

from schemas.frames import Peaks
from schemas.record import PeaksRecord


def bandwidth_bytes_per_s(record: PeaksRecord | None) -> float | None:
    """What the device's memory was read with; None where it was not measured."""
    peaks = _measured(record)
    return peaks.read_bytes_per_s if peaks else None


def matrix_flop_per_s(record: PeaksRecord | None, dtype: str) -> float | None:
    """What the device multiplied matrices of this torch dtype with; None where it was not measured."""
    peaks = _measured(record)
    return peaks.matrix_flop_per_s.get(dtype) if peaks else None


def _measured(record: PeaksRecord | None) -> Peaks | None:
    return record.outcome if record and isinstance(record.outcome, Peaks) else None
