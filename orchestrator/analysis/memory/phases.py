"""Memory by phase, as torch and NVML saw it: pure functions over records.

Both were read at the same synchronized instants, the phase edges, so their difference is the GPU memory
outside torch's allocator: the CUDA context, cuBLAS, loaded modules, and allocations of other libraries.
Between edges torch keeps its own high-water mark, reset at each edge, and NVML's peak comes from samples of
the whole device.
"""

from collections.abc import Iterator
from itertools import dropwhile, pairwise

import msgspec

from schemas.frames import PhaseName
from schemas.record import CellRecord, MemoryReading, PhaseEdge


class PhaseMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of one phase, in bytes: at the end of the phase, and the highest seen during it.

    Recurring phases (prefill and decode) are merged over trials: the last end, the highest peak.
    """

    phase: PhaseName
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    process_bytes: int | None = None
    """NVML's figure for the worker process; its resident set if there is no NVIDIA GPU."""
    device_bytes: int | None = None
    sampled_peak_bytes: int | None = None
    """Highest sample: of the whole device with NVML, of the resident set without it."""
    sampled_peak_at_ns: int | None = None
    """When it was first seen, on the monotonic clock of the record's edges."""
    outside_torch_bytes: int | None = None
    """process − reserved; None if either is unknown."""
    device_over_baseline_bytes: int | None = None
    """Growth of the device's memory in use since just before the worker started. It only estimates the
    worker's share, for when NVML hides that share: other processes on the GPU change it too."""


class MemorySummary(msgspec.Struct, frozen=True, kw_only=True):
    """The memory columns of a cell's row."""

    on_gpu: bool
    loaded_bytes: int | None
    peak_bytes: int | None
    nvml_peak_bytes: int | None


def summarize_memory(cell: CellRecord, phases: list[PhaseMemory]) -> MemorySummary:
    """Footprint after load, and peaks after that. `phases` are those of the cell."""
    load = next((phase for phase in phases if phase.phase == "load"), None)
    later = phases_after_load(phases)
    if on_gpu(cell):
        return MemorySummary(
            on_gpu=True,
            loaded_bytes=load.allocated_bytes if load else None,
            peak_bytes=_highest(phase.peak_allocated_bytes for phase in later),
            nvml_peak_bytes=_highest(_process_bytes_after_load(cell)),
        )
    # A resident set peaks between the edges, so without the samples its peak is unknown.
    lost = cell.sampler is not None and cell.sampler.samples and not cell.samples
    return MemorySummary(
        on_gpu=False,
        loaded_bytes=load.process_bytes if load else None,
        peak_bytes=None if lost else _highest(phase.sampled_peak_bytes for phase in later),
        nvml_peak_bytes=None,
    )


def phases_after_load(phases: list[PhaseMemory]) -> list[PhaseMemory]:
    """Phases that use the model, without the profiler's pass, whose extra memory is the profiler's."""
    after = dropwhile(lambda phase: phase.phase != "load", phases)
    return [phase for phase in after if phase.phase not in ("load", "profile")]


def _process_bytes_after_load(cell: CellRecord) -> Iterator[int | None]:
    """At each edge from warm-up to the profiler's pass, or to the end if there was none."""
    edges = list(dropwhile(lambda edge: edge.phase.name != "warmup", cell.edges))
    profiled = any(edge.phase.name == "profile" for edge in edges)
    for edge in edges[: -1 if profiled else None]:
        yield edge.reading.process_bytes if edge.reading else None


def on_gpu(cell: CellRecord) -> bool:
    """Whether the worker reported an NVIDIA GPU as its device."""
    return cell.ready is not None and cell.ready.device_uuid is not None


def phase_memory(cell: CellRecord) -> list[PhaseMemory]:
    """Every phase that the worker went through, in order of first entry."""
    merged: dict[PhaseName, PhaseMemory] = {}
    for start, end in pairwise(cell.edges):
        span = _span(start, end, cell)
        merged[span.phase] = _merge(merged[span.phase], span) if span.phase in merged else span
    return list(merged.values())


def _span(start: PhaseEdge, end: PhaseEdge, cell: CellRecord) -> PhaseMemory:
    torch, reading = end.phase.torch, end.reading
    process_bytes = reading.process_bytes if reading else None
    device_bytes, baseline_bytes = reading.device_bytes if reading else None, cell.baseline_device_bytes
    during = (sample for sample in cell.samples if start.phase.at_ns <= sample.at_ns <= end.phase.at_ns)
    # The edge counts as a sample too: a phase may be shorter than the sampling period.
    seen = [*during, *([] if reading is None else [reading])]
    known = [sample for sample in seen if _sampled(sample) is not None]
    peak = max(known, key=lambda sample: _sampled(sample) or 0, default=None)
    return PhaseMemory(
        phase=start.phase.name,
        allocated_bytes=torch.allocated_bytes if torch else None,
        reserved_bytes=torch.reserved_bytes if torch else None,
        peak_allocated_bytes=torch.peak_allocated_bytes if torch else None,
        peak_reserved_bytes=torch.peak_reserved_bytes if torch else None,
        process_bytes=process_bytes,
        device_bytes=device_bytes,
        sampled_peak_bytes=_sampled(peak) if peak else None,
        sampled_peak_at_ns=peak.at_ns if peak else None,
        outside_torch_bytes=process_bytes - torch.reserved_bytes
        if torch and process_bytes is not None
        else None,
        device_over_baseline_bytes=device_bytes - baseline_bytes
        if device_bytes is not None and baseline_bytes is not None
        else None,
    )


def _sampled(sample: MemoryReading) -> int | None:
    return sample.process_bytes if sample.device_bytes is None else sample.device_bytes


def _merge(earlier: PhaseMemory, later: PhaseMemory) -> PhaseMemory:
    seen = [phase for phase in (earlier, later) if phase.sampled_peak_bytes is not None] or [later]
    higher = max(seen, key=lambda phase: phase.sampled_peak_bytes or 0)
    return msgspec.structs.replace(
        later,
        peak_allocated_bytes=_highest((earlier.peak_allocated_bytes, later.peak_allocated_bytes)),
        peak_reserved_bytes=_highest((earlier.peak_reserved_bytes, later.peak_reserved_bytes)),
        sampled_peak_bytes=higher.sampled_peak_bytes,
        sampled_peak_at_ns=higher.sampled_peak_at_ns,
    )


def _highest(values: "Iterator[int | None] | tuple[int | None, ...]") -> int | None:
    return max((value for value in values if value is not None), default=None)
