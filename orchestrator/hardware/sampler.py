"""The memory sampler: a worker's memory, and how its GPU runs, seen from outside.

Two kinds of look are taken, because they cost differently:

- a *sample* every tenth of a second from a thread of its own shows the course of memory and catches
  peaks between phases. With NVML it holds the device's bytes, a call of some microseconds, and the GPU's
  clocks, temperature, power and what limits the clocks, 1 to 2 µs each. Energy is not among them: that
  call takes 4 ms;
- an *edge* is read once per phase, while the worker stands still and has just read its own allocator. It
  adds the process's bytes, and who else is on the GPU; listing processes takes a lock in the driver, so it
  is not done in passing. It also adds the driver's counters of time under restraint, whose growth between
  two edges tells what fell between samples.

The thread sleeps on an event between samples: sampling must not take the core that a host-bound worker
needs. `stats()` says what it did take. Times are CLOCK_MONOTONIC, as in the worker's frames.
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
"""Whoever asks the driver more often than 20 times a second begins to measure himself."""


class MemorySource(Protocol):
    """Where readings come from; `name` is what SamplerStats calls it."""

    name: str
    enumerations: int
    """How often processes were listed."""

    def read(self, processes: bool) -> MemoryReading:
        """Look now; `processes` asks for what an edge holds beyond a sample: the worker's own share.

        Raises `psutil.NoSuchProcess` once there is no worker to look at.
        """


class NvmlSource:
    """A GPU's bytes, how it runs, and the share of one process on it.

    `pid` may be set anew: what was started may be a launcher, and `Ready` brings the worker's own.
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
    """Who else is listed, in order of pid; helpers that the worker started are no strangers.

    None where the worker itself is not listed: under a hidden pid, any of the others may be it.
    """
    pids = {listed_pid for listed_pid, _ in listed}
    if pid not in pids:
        return None
    strangers = sorted(pids - {pid} - _started_by(pid)) if len(pids) > 1 else []
    return [ForeignProcess(pid=each, used_bytes=share_of(each, listed)[0]) for each in strangers]


def _started_by(pid: int) -> set[int]:
    try:
        return {child.pid for child in psutil.Process(pid).children(recursive=True)}
    except psutil.NoSuchProcess:
        return set()


class ResidentSetSource:
    """The bytes of main memory that one process holds: the measure where the worker is on no GPU.

    `pid` may be set anew, as in NvmlSource.
    """

    name = "resident-set"
    enumerations = 0

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def read(self, processes: bool) -> MemoryReading:
        at_ns = time.monotonic_ns()
        rss_bytes = psutil.Process(self.pid).memory_info().rss
        if rss_bytes == 0:  # ended, but not waited for yet: the kernel shows a zombie of no size
            raise psutil.NoSuchProcess(self.pid)
        reason = "not on an NVIDIA GPU: resident set of the worker process" if processes else None
        return MemoryReading(at_ns=at_ns, process_bytes=rss_bytes, reason=reason)


class MemorySampler:
    """Samples a source every `period_s` seconds, but at most 20 times a second, for the length of a `with`.

    Sampling ends quietly where the worker ends first.
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
        """Read now, in the caller's thread, with the worker's own share. Not among `samples`."""
        try:
            return self.source.read(processes=True)
        except psutil.NoSuchProcess:
            return MemoryReading(at_ns=time.monotonic_ns(), reason="the worker process has ended")

    def stats(self) -> SamplerStats:
        """What sampling cost and achieved so far; before two samples, `period_s` is as asked."""
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
        """Samples that should have lain in a gap between two."""
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
