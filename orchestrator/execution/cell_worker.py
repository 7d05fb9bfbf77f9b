"""Cells measured by one worker process, and the record of each."""

import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from orchestrator.execution.idle_gpu import IdleGpu
from orchestrator.execution.progress import Watcher
from orchestrator.execution.worker_session import WorkerSession, WorkerStart
from orchestrator.hardware.nvml import Nvml
from orchestrator.planning.plan import Cell
from orchestrator.records.store import RunFolder
from schemas.frames import Done, Failed
from schemas.record import CellRecord, Leftover, Skipped


class RunContext(NamedTuple):
    """What all workers of a run share."""

    folder: RunFolder
    watcher: Watcher
    nvml: Nvml | None
    idle: IdleGpu
    lent: Path
    """The folder of `lent_packages`."""
    timeout_s: float


class Timing(NamedTuple):
    """When a cell was measured; see the fields of `CellRecord`."""

    started_at: str
    began_ns: int
    wall_s: float


class CellWorker:
    """One precision's process, started by its first cell, and given one cell after another.

    It is usable until the process ends: after a crash, a timeout, or a failure that leaves the device in
    doubt, the remaining cells need a new one.
    """

    def __init__(self, first: Cell, context: RunContext) -> None:
        self.context = context
        self.usable = True
        log = context.folder.new_log(first.precision.name)
        start = WorkerStart(first.interpreter, first.precision.module, context.lent, log)
        self.session = WorkerSession(start, context.timeout_s, context.nvml)
        self._leftover: Leftover | None = None
        self._load_failure: Failed | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.session.__exit__(kind, error, traceback)

    def measure(self, cell: Cell) -> CellRecord:
        """Measure one cell, and record everything that was reported and observed."""
        self.context.watcher.begin(cell.job)
        if self._load_failure is not None:  # every cell would fail in the same way
            record = self._record(cell, self._load_failure)
            self.context.watcher.end(record)
            return record
        record = self._follow(cell)
        self.context.watcher.end(record)
        self._settle()
        return record

    def _follow(self, cell: Cell) -> CellRecord:
        started_at = datetime.now(UTC).isoformat(timespec="seconds")
        began_ns = time.monotonic_ns()
        if not self.session.is_started:
            self._leftover = self.context.idle.wait()
        for frame, memory in self.session.events(cell.job):
            self.context.watcher.see(frame, memory)
        timing = Timing(started_at, began_ns, (time.monotonic_ns() - began_ns) / 1e9)
        return self._record(cell, self.session.seen.outcome, timing)

    def _settle(self) -> None:
        """Note whether the worker can measure another cell."""
        waits, seen = self.session.waits_for_more(), self.session.seen
        self.context.idle.note(seen.ready)
        if isinstance(seen.outcome, Failed) and not seen.is_loaded:
            self._load_failure = seen.outcome
        else:
            self.usable = waits

    def _record(self, cell: Cell, outcome: Done | Failed, timing: Timing | None = None) -> CellRecord:
        seen, log = self.session.seen, self.session.start.log
        return CellRecord(
            precision=cell.precision.name,
            label=cell.precision.label,
            bits_per_weight=cell.precision.bits_per_weight,
            outcome=outcome,
            job=cell.job,
            started_at=timing.started_at if timing else None,
            began_ns=timing.began_ns if timing else None,
            wall_s=timing.wall_s if timing else None,
            ready=seen.ready,
            loaded=seen.loaded,
            setup=seen.setup,
            warmed_up=seen.warmed_up,
            edges=seen.edges,
            trials=seen.trials,
            profile=seen.profile,
            samples=seen.samples,
            baseline_device_bytes=seen.baseline_device_bytes,
            leftover=self._leftover,
            nvml_uuid=seen.nvml_uuid,
            sampler=seen.sampler.stats() if seen.sampler else None,
            log=f"logs/{log.name}" if log else None,
        )


def not_run(cell: Cell, outcome: Failed | Skipped) -> CellRecord:
    """The record of a cell for which no worker was started."""
    return CellRecord(
        precision=cell.precision.name,
        label=cell.precision.label,
        bits_per_weight=cell.precision.bits_per_weight,
        outcome=outcome,
        job=cell.job,
    )
