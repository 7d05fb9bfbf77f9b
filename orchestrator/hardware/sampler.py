"""The memory sampler: a worker's memory and its GPU's clocks and power, observed from outside.

There are two kinds of reading, because they differ in cost:

- a *sample*, taken in a thread every tenth of a second, follows memory over time and catches peaks between
  phases. With NVML it holds the device's bytes (a call of a few microseconds) and the GPU's clocks,
  temperature, power and clock limits (1 to 2 µs each). Energy is omitted: that call takes 4 ms;
- an *edge* is read once per phase, while the worker is paused and has just read its own allocator. It adds
  the process's bytes and other processes on the GPU, which samples omit because listing processes takes a
  lock in the driver. It also adds the driver's counters of throttled time: their growth between two edges
  covers the time between samples.

The thread sleeps on an event between samples, because sampling must not use CPU time that a host-bound
worker needs. `stats()` reports its cost. Times are CLOCK_MONOTONIC, as in the worker's frames.
"""

import statistics
import threading
import time
from contextlib import suppress
from itertools import pairwise
from types import TracebackType
from typing import Protocol, Self

import msgspec
import psutil

from orchestrator.hardware.nvml import Listed, Nvml, NvmlUnavailable, share_of
from schemas.record import ForeignProcess, MemoryReading, SamplerStats

SHORTEST_PERIOD_S = 0.05
"""Querying the driver more than 20 times a second would disturb the measurement."""


class MemorySource(Protocol):
    """Where readings come from; `name` is its name in SamplerStats."""

    name: str
    enumerations: int
    """How often processes were listed."""

    def read(self, processes: bool) -> MemoryReading:
        """Read now; `processes` adds the worker's share and other processes, as for an edge.

        Raises `psutil.NoSuchProcess` once the worker is gone.
        """


class NvmlSource:
    """A GPU's bytes, its clocks and power, and the share of one process on it.

    `pid` may change: the process started may be a launcher, and `Ready` reports the worker's own pid.
    """

    name = "nvml"

    def __init__(self, nvml: Nvml, uuid: str, pid: int) -> None:
        self.nvml = nvml
        self.uuid = uuid
        self.pid = pid
        self.enumerations = 0

    def read(self, processes: bool) -> MemoryReading:
        at_ns = time.monotonic_ns()
        try:
            device_bytes = self.nvml.device_bytes(self.uuid)
            gpu = self.nvml.state(self.uuid, counters=processes)
        except NvmlUnavailable as error:
            return MemoryReading(at_ns=at_ns, reason=str(error))
        sample = MemoryReading(at_ns=at_ns, device_bytes=device_bytes, gpu=gpu)
        return self._with_processes(sample) if processes else sample

    def _with_processes(self, sample: MemoryReading) -> MemoryReading:
        self.enumerations += 1
        try:
            listed = self.nvml.processes(self.uuid)
        except NvmlUnavailable as error:
            return msgspec.structs.replace(sample, reason=str(error))
        process_bytes, reason = share_of(self.pid, listed)
        others = others_than(self.pid, listed)
        return msgspec.structs.replace(sample, process_bytes=process_bytes, reason=reason, others=others)


def others_than(pid: int, listed: Listed) -> list[ForeignProcess] | None:
    """The other listed processes by pid, without those that the worker started.

    None if the worker itself is not listed: its pid is hidden, so any of the others may be it.
    """
    pids = {listed_pid for listed_pid, _ in listed}
    if pid not in pids:
        return None
    others = sorted(pids - {pid} - _started_by(pid)) if len(pids) > 1 else []
    return [ForeignProcess(pid=each, used_bytes=share_of(each, listed)[0]) for each in others]


def _started_by(pid: int) -> set[int]:
    try:
        return {child.pid for child in psutil.Process(pid).children(recursive=True)}
    except psutil.NoSuchProcess:
        return set()


class ResidentSetSource:
    """The main memory that one process holds, measured if the worker runs on the CPU.

    `pid` may change, as in NvmlSource.
    """

    name = "resident-set"
    enumerations = 0

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def read(self, processes: bool) -> MemoryReading:
        at_ns = time.monotonic_ns()
        rss_bytes = psutil.Process(self.pid).memory_info().rss
        if rss_bytes == 0:  # a zombie: it has ended but was not waited for yet
            raise psutil.NoSuchProcess(self.pid)
        reason = "not on an NVIDIA GPU: resident set of the worker process" if processes else None
        return MemoryReading(at_ns=at_ns, process_bytes=rss_bytes, reason=reason)


class MemorySampler:
    """Samples a source every `period_s` seconds, at most 20 times a second, during a `with` block.

    Sampling stops without an error if the worker ends first.
    """

    def __init__(self, source: MemorySource, period_s: float = 0.1) -> None:
        self.source = source
        self.period_s = max(period_s, SHORTEST_PERIOD_S)
        self.samples: list[MemoryReading] = []
        self._call_s: list[float] = []
        self._cpu_s = self._wall_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory-sampler", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def latest(self) -> MemoryReading | None:
        """The newest sample."""
        return self.samples[-1] if self.samples else None

    def edge(self) -> MemoryReading:
        """Read now, in the caller's thread, with the worker's share. Not added to `samples`."""
        try:
            return self.source.read(processes=True)
        except psutil.NoSuchProcess:
            return MemoryReading(at_ns=time.monotonic_ns(), reason="the worker process has ended")

    def stats(self) -> SamplerStats:
        """The cost and quality of sampling so far; before the second sample, `period_s` is as requested."""
        gaps_ns = [later.at_ns - earlier.at_ns for earlier, later in pairwise(self.samples)]
        return SamplerStats(
            source=self.source.name,
            samples=len(self.samples),
            period_s=statistics.median(gaps_ns) / 1e9 if gaps_ns else self.period_s,
            cpu_s=self._cpu_s,
            wall_s=self._wall_s,
            median_call_s=statistics.median(self._call_s) if self._call_s else None,
            longest_call_s=max(self._call_s, default=None),
            missed=sum(self._missed(gap_ns / 1e9) for gap_ns in gaps_ns),
            enumerations=self.source.enumerations,
        )

    def _missed(self, gap_s: float) -> int:
        """How many samples are missing from the gap between two."""
        return int(gap_s / self.period_s) - 1 if gap_s > 2 * self.period_s else 0

    def _sample(self) -> None:
        started_s = time.monotonic()
        with suppress(psutil.NoSuchProcess):
            while not self._stop.is_set():
                call_began_s = time.monotonic()
                self.samples.append(self.source.read(processes=False))
                self._call_s.append(time.monotonic() - call_began_s)
                self._cpu_s, self._wall_s = time.thread_time(), time.monotonic() - started_s
                self._stop.wait(self.period_s)
