"""The gap between torch's peak memory and NVML's.

Torch's peak is exact, since the allocator records every block it hands out, but it counts blocks only.
NVML's peak is the highest of the samples, ten a second, and of the readings at phase edges, and it is of the
whole device: it includes torch's free blocks, memory outside torch, and that of the driver and other
processes. The samples can miss only memory that torch returned to the driver within a sampling period.
"""

import msgspec

from orchestrator.analysis.memory.phases import PhaseMemory, on_gpu, phases_after_load
from orchestrator.units import mib
from schemas.frames import PhaseName
from schemas.record import CellRecord


class PeakGap(msgspec.Struct, frozen=True, kw_only=True):
    """NVML's highest sample after load, in bytes: torch + kept + outside + others."""

    phase: PhaseName
    seen_at_s: float
    """Since the worker's start."""
    device_bytes: int
    torch_bytes: int
    """Torch's peak of allocated blocks in that phase."""
    kept_bytes: int
    """Torch's peak of reserved memory less that: free blocks and parts of blocks."""
    outside_bytes: int
    """Memory of the worker process outside torch, at the end of the phase."""
    others_bytes: int
    """The rest: the driver's and other processes'. Below 0 if torch's peak fell between two samples."""


def peak_gap(cell: CellRecord, phases: list[PhaseMemory]) -> PeakGap | None:
    """None if one of the two peaks is unknown, as on a CPU. `phases` are those of the cell."""
    sampled = [phase for phase in phases_after_load(phases) if phase.sampled_peak_bytes is not None]
    if not sampled or not on_gpu(cell):
        return None
    highest = max(sampled, key=lambda phase: phase.sampled_peak_bytes or 0)
    device, at_ns = highest.sampled_peak_bytes, highest.sampled_peak_at_ns
    allocated, reserved = highest.peak_allocated_bytes, highest.peak_reserved_bytes
    outside = highest.outside_torch_bytes
    if device is None or at_ns is None or allocated is None or reserved is None or outside is None:
        return None
    return PeakGap(
        phase=highest.phase,
        seen_at_s=(at_ns - cell.edges[0].phase.at_ns) / 1e9,
        device_bytes=device,
        torch_bytes=allocated,
        kept_bytes=reserved - allocated,
        outside_bytes=outside,
        others_bytes=device - reserved - outside,
    )


def gap_sentence(gap: PeakGap, sampling_period_s: float) -> str:
    """The terms of the gap, in words."""
    rest = f"and {mib(gap.others_bytes)} of the driver and other processes"
    if gap.others_bytes < 0:
        missed = mib(-gap.others_bytes)
        rest = f"minus {missed} allocated and freed between samples {sampling_period_s:.2f} s apart"
    return (
        f"NVML's peak, {mib(gap.device_bytes)} MiB of the device, was seen {gap.seen_at_s:.1f} s after the "
        f"worker started, in {gap.phase}: {mib(gap.torch_bytes)} at torch's own peak, {mib(gap.kept_bytes)} "
        f"in torch's free blocks, {mib(gap.outside_bytes)} outside torch, {rest}"
    )
