"""Torch's peak of memory and NVML's, and what lies between the two.

Torch's is exact, since its allocator notes every block that it hands out, and it is of blocks alone. NVML's
is the highest of samples, ten a second, and of readings at phase edges, and it is of the whole device: what
torch keeps in free blocks, what lies outside torch, and what the driver and others hold are all in it. Only
what torch gave back to the driver within a sampling period may have escaped it.
"""

import msgspec

from orchestrator.analysis.memory.phases import on_gpu, phases_after_load
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
    """What torch's peak of reserved memory was above it: free blocks and parts of blocks."""
    outside_bytes: int
    """Of the worker's process but not of torch, at the end of the phase."""
    others_bytes: int
    """The rest: of the driver and of other processes. Below 0, torch's peak fell between samples."""


def peak_gap(cell: CellRecord) -> PeakGap | None:
    """None where one of the two peaks is unknown, as on a CPU."""
    phases = [phase for phase in phases_after_load(cell) if phase.sampled_peak_bytes is not None]
    if not phases or not on_gpu(cell):
        return None
    highest = max(phases, key=lambda phase: phase.sampled_peak_bytes or 0)
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
    """What lies between the two peaks, in words."""
    rest = f"and {mib(gap.others_bytes)} of the driver and of other processes"
    if gap.others_bytes < 0:
        missed = mib(-gap.others_bytes)
        rest = f"less {missed} that came and went between samples {sampling_period_s:.2f} s apart"
    return (
        f"NVML's peak, {mib(gap.device_bytes)} MiB of the device, was seen {gap.seen_at_s:.1f} s after the "
        f"worker's start, in {gap.phase}: {mib(gap.torch_bytes)} at torch's own peak, {mib(gap.kept_bytes)} "
        f"that torch kept in free blocks, {mib(gap.outside_bytes)} outside torch, {rest}"
    )
