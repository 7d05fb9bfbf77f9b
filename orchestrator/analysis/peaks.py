"""The device's measured peaks, with which every row is compared."""

from schemas.frames import Peaks
from schemas.record import PeaksRecord


def bandwidth_bytes_per_s(record: PeaksRecord | None) -> float | None:
    """Measured read bandwidth of the device's memory; None if not measured."""
    peaks = _measured(record)
    return peaks.read_bytes_per_s if peaks else None


def matrix_flop_per_s(record: PeaksRecord | None, dtype: str) -> float | None:
    """Measured matrix multiplication rate for this torch dtype; None if not measured."""
    peaks = _measured(record)
    return peaks.matrix_flop_per_s.get(dtype) if peaks else None


def _measured(record: PeaksRecord | None) -> Peaks | None:
    return record.outcome if record and isinstance(record.outcome, Peaks) else None
