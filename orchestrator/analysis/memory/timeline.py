"""Memory over time: the lifetime of a worker as series of points and spans of phases, ready to be drawn.

Cells measured by one worker share a process, so they follow one another on one clock: seconds since the
worker started. Three sources share that clock, and each shows something different:

- samples of the device, ten a second, count everything on it but can't tell which process owns it;
- NVML's figure for the process is read at phase edges only, since asking for it takes a lock in the driver;
- torch's own figures are read at the same edges, and torch keeps the peak of each phase.

Between two edges only the samples and torch's peaks are known.
"""

from itertools import pairwise

import msgspec

from orchestrator.analysis.memory.phases import on_gpu
from orchestrator.records.names import cell_namer
from schemas.frames import Failed, PhaseName
from schemas.record import CellRecord, MemoryReading, PhaseEdge, Run


class Point(msgspec.Struct, frozen=True):
    """A figure and when it was read; None if the sample failed, so that the curve has a gap."""

    at_s: float
    held_bytes: int | None


class PhaseSpan(msgspec.Struct, frozen=True, kw_only=True):
    """A phase from its edge to the next one, or to the last sign of the worker."""

    phase: PhaseName
    start_s: float
    end_s: float
    peak_allocated_bytes: int | None = None
    """Torch's peak in this phase; None if the phase did not reach its end."""


class CellSpan(msgspec.Struct, frozen=True, kw_only=True):
    """When a worker measured a cell; work done once for all cells counts to the first."""

    name: str
    start_s: float
    end_s: float
    failed: bool


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """One worker's memory; seconds count from its start, series are in chronological order."""

    precision: str
    label: str
    on_gpu: bool
    cells: list[CellSpan]
    phases: list[PhaseSpan]
    """Consecutive, without gap or overlap."""
    sampled: list[Point]
    """The whole device with NVML, at samples and edges; without NVML the worker's resident set."""
    process: list[Point]
    """NVML's figure for the worker, at edges; empty on a CPU, or if it was always hidden."""
    reserved: list[Point]
    """Device memory held by torch's allocator, at edges."""
    allocated: list[Point]
    """The part of that in tensors, at edges."""

    @property
    def end_s(self) -> float:
        """The last sign of the worker."""
        return self.phases[-1].end_s

    @property
    def highest_bytes(self) -> int:
        """The highest figure of all series and peaks; 0 if nothing is known."""
        series = (*self.sampled, *self.process, *self.reserved, *self.allocated)
        marks = (span.peak_allocated_bytes or 0 for span in self.phases)
        return max((*(point.held_bytes or 0 for point in series), *marks), default=0)

    @property
    def first_known_s(self) -> float:
        """When the first figure was read; the imports before it use no memory that is counted."""
        series = (*self.sampled, *self.process, *self.allocated)
        return min((point.at_s for point in series if point.held_bytes is not None), default=0.0)


def timelines(run: Run, cells: list[CellRecord]) -> list[Timeline]:
    """One per worker of these `cells` of `run`, in the order in which the workers started."""
    workers: dict[tuple[int | None, int], list[CellRecord]] = {}
    for cell in cells:
        if cell.edges:
            workers.setdefault(_worker(cell), []).append(cell)
    return [_timeline(run, own) for own in workers.values()]


def _worker(cell: CellRecord) -> tuple[int | None, int]:
    """Its pid and its start: pids may be reused within a run, and a worker that failed early reports none."""
    return cell.ready.pid if cell.ready else None, cell.edges[0].phase.at_ns


def _timeline(run: Run, cells: list[CellRecord]) -> Timeline:
    # The edges of every cell begin with the worker's own, up to its first set-up.
    edges = sorted({edge.phase.at_ns: edge for cell in cells for edge in cell.edges}.values(), key=_at_ns)
    start_ns = edges[0].phase.at_ns
    readings = [sample for cell in cells for sample in cell.samples]
    readings += [edge.reading for edge in edges if edge.reading]
    readings.sort(key=lambda reading: reading.at_ns)
    end_ns = max(edges[-1].phase.at_ns, *(reading.at_ns for reading in readings), start_ns)
    from_nvml = on_gpu(cells[0])
    return Timeline(
        precision=cells[0].precision,
        label=cells[0].label,
        on_gpu=from_nvml,
        cells=_cells(run, cells, start_ns, end_ns),
        phases=_phases(edges, end_ns),
        sampled=_sampled(readings, start_ns, from_nvml),
        process=_process(edges, start_ns) if from_nvml else [],
        reserved=_torch(edges, "reserved_bytes"),
        allocated=_torch(edges, "allocated_bytes"),
    )


def _at_ns(edge: PhaseEdge) -> int:
    return edge.phase.at_ns


def _cells(run: Run, cells: list[CellRecord], start_ns: int, end_ns: int) -> list[CellSpan]:
    name = cell_namer(run.cells)
    seen: set[int] = set()
    begins_ns: list[int] = []
    for cell in cells:
        own = [edge.phase.at_ns for edge in cell.edges if edge.phase.at_ns not in seen]
        begins_ns.append(min(own, default=end_ns))
        seen.update(own)
    return [
        CellSpan(
            name=name(cell),
            start_s=(begin_ns - start_ns) / 1e9,
            end_s=(until_ns - start_ns) / 1e9,
            failed=isinstance(cell.outcome, Failed),
        )
        for cell, (begin_ns, until_ns) in zip(cells, pairwise([*begins_ns, end_ns]), strict=True)
    ]


def _phases(edges: list[PhaseEdge], end_ns: int) -> list[PhaseSpan]:
    start_ns = edges[0].phase.at_ns
    spans = []
    for edge, after in zip(edges, [*edges[1:], None], strict=True):
        torch = after.phase.torch if after else None
        spans.append(
            PhaseSpan(
                phase=edge.phase.name,
                start_s=(edge.phase.at_ns - start_ns) / 1e9,
                end_s=((after.phase.at_ns if after else end_ns) - start_ns) / 1e9,
                peak_allocated_bytes=torch.peak_allocated_bytes if torch else None,
            )
        )
    return spans


def _sampled(readings: list[MemoryReading], start_ns: int, from_nvml: bool) -> list[Point]:
    return [
        Point((reading.at_ns - start_ns) / 1e9, reading.device_bytes if from_nvml else reading.process_bytes)
        for reading in readings
    ]


def _process(edges: list[PhaseEdge], start_ns: int) -> list[Point]:
    return [
        Point((edge.reading.at_ns - start_ns) / 1e9, edge.reading.process_bytes)
        for edge in edges
        if edge.reading and edge.reading.process_bytes is not None
    ]


def _torch(edges: list[PhaseEdge], field: str) -> list[Point]:
    start_ns = edges[0].phase.at_ns
    return [
        Point((edge.phase.at_ns - start_ns) / 1e9, getattr(edge.phase.torch, field))
        for edge in edges
        if edge.phase.torch
    ]
