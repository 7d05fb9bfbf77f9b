"""A run: one fresh worker process after another, each watched from outside while it measures.

The parent sleeps in a `select` between frames, so it takes no core from the worker, whose decode loop
on a fast GPU is bound by the host.
"""

import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from orchestrator.interpreter import lent_packages, worker_command, worker_environment
from orchestrator.nvml import Nvml, NvmlUnavailable
from orchestrator.plan import Cell, Plan
from orchestrator.progress import Watcher
from orchestrator.store import RunFolder
from orchestrator.vram import MemorySampler, NvmlSource, ResidentSetSource
from orchestrator.worker_process import WorkerProcess
from schemas.frames import AnyFrame, Done, Failed, Loaded, Phase, Ready, Trial
from schemas.record import CellRecord, MemoryReading, PhaseEdge, Skipped


def run_plan(
    plan: Plan, folder: RunFolder, watcher: Watcher, nvml: Nvml | None, timeout_s: float, explicit: bool
) -> None:
    """Run every cell and keep each record as it ends.

    A cell that can't run here is a failure where it was asked for by name (`explicit`), else left out.
    """
    budget = Budget(plan.budget_s, len(plan.runnable))
    with lent_packages() as lent, watcher:
        for cell in plan.cells:
            if cell.why_not is not None:
                folder.append(_not_run(cell, cell.why_not, explicit))
                continue
            share_s = budget.next_share_s()
            if share_s is not None and share_s <= 0:
                folder.append(_not_run(cell, f"the budget of {plan.budget_s:g} s is spent", False))
                continue
            job = msgspec.structs.replace(cell.job, budget_s=share_s)
            cell = cell._replace(job=job)
            watcher.begin(job)
            record = run_cell(cell, lent, folder.log(job.precision), watcher, nvml, timeout_s)
            folder.append(record)
            budget.spend(measuring_s(record))
            watcher.end(record)


class Budget:
    """Seconds shared out among the cells to come; what one leaves over, the next ones get."""

    def __init__(self, total_s: float | None, cells: int) -> None:
        self.left_s = total_s
        self.cells_left = cells

    def next_share_s(self) -> float | None:
        """Seconds for the next cell, None where time is no object."""
        share_s = None if self.left_s is None else self.left_s / self.cells_left
        self.cells_left -= 1
        return share_s

    def spend(self, seconds: float) -> None:
        if self.left_s is not None:
            self.left_s -= seconds


def measuring_s(record: CellRecord) -> float:
    """The cell's wall time without preparation, which is done once and kept."""
    wall_s = record.wall_s or 0.0
    prepare = next((edge.phase for edge in record.edges if edge.phase.name == "prepare"), None)
    if prepare is None or record.ready is None:
        return wall_s
    return wall_s - (record.ready.at_ns - prepare.at_ns) / 1e9


def run_cell(
    cell: Cell, lent: Path, log: Path, watcher: Watcher, nvml: Nvml | None, timeout_s: float
) -> CellRecord:
    """Run one worker to its end and gather all that it said and all that was seen of it."""
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    start_s = time.monotonic()
    command = worker_command(cell.interpreter, cell.precision.module)
    environment = worker_environment(cell.interpreter, lent)
    # The observation first: it reads how much of the GPU is in use before there is a worker.
    with (
        Observation(cell.job.device, nvml) as seen,
        WorkerProcess(command, environment, cell.job, log) as worker,
    ):
        seen.watch_resident_set(worker.pid)
        for frame in worker.frames(timeout_s):
            if frame is not None:
                seen.take(frame)
            if isinstance(frame, Phase):
                worker.acknowledge()
            watcher.see(frame, seen.latest)
    return CellRecord(
        precision=cell.precision.name,
        label=cell.precision.label,
        bits_per_weight=cell.precision.bits_per_weight,
        outcome=seen.outcome,
        job=cell.job,
        started_at=started_at,
        wall_s=time.monotonic() - start_s,
        ready=seen.ready,
        loaded=seen.loaded,
        edges=seen.edges,
        trials=seen.trials,
        samples=seen.sampler.samples if seen.sampler else [],
        baseline_device_bytes=seen.baseline_device_bytes,
        sampler=seen.sampler.stats() if seen.sampler else None,
        log=f"logs/{log.name}",
    )


class Observation:
    """What a worker said, joined with what memory looked like from outside at the same instants."""

    def __init__(self, device: str, nvml: Nvml | None) -> None:
        self.on_gpu = device != "cpu"
        self.nvml = nvml
        self.ready: Ready | None = None
        self.loaded: Loaded | None = None
        self.edges: list[PhaseEdge] = []
        self.trials: list[Trial] = []
        self.outcome: Done | Failed = Failed(kind="crashed", message="the worker never spoke")
        self.sampler: MemorySampler | None = None
        self._idle_bytes = _idle_bytes(nvml) if nvml and self.on_gpu else {}
        self._stack = ExitStack()

    def __enter__(self) -> "Observation":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def latest(self) -> MemoryReading | None:
        return self.sampler.latest if self.sampler else None

    @property
    def baseline_device_bytes(self) -> int | None:
        """The GPU's use just before the worker was started."""
        uuid = self.ready.device_uuid if self.ready else None
        return self._idle_bytes.get(uuid) if uuid else None

    def watch_resident_set(self, pid: int) -> None:
        if not self.on_gpu:
            self.sampler = self._stack.enter_context(MemorySampler(ResidentSetSource(pid)))

    def take(self, frame: AnyFrame) -> None:
        """Note a frame; at a phase edge the worker stands still, so memory is read right here."""
        match frame:
            case Phase():
                reading = self.sampler.edge() if self.sampler else None
                self.edges.append(PhaseEdge(phase=frame, reading=reading))
            case Ready():
                self.ready = frame
                # Only torch knows which GPU it took, whatever CUDA_VISIBLE_DEVICES says; and only the
                # worker knows its own pid, since what was started may have been a launcher.
                if self.nvml is not None and frame.device_uuid is not None:
                    source = NvmlSource(self.nvml, frame.device_uuid, frame.pid)
                    self.sampler = self._stack.enter_context(MemorySampler(source))
            case Loaded():
                self.loaded = frame
            case Trial():
                self.trials.append(frame)
            case Done() | Failed():
                self.outcome = frame


def _idle_bytes(nvml: Nvml) -> dict[str, int]:
    idle = {}
    for gpu in nvml.gpus():
        try:
            idle[gpu.uuid] = nvml.device_bytes(gpu.uuid)
        except NvmlUnavailable:
            continue  # the sampler will say so, with its reason, if this is the GPU that is used
    return idle


def _not_run(cell: Cell, why: str, failed: bool) -> CellRecord:
    return CellRecord(
        precision=cell.precision.name,
        label=cell.precision.label,
        bits_per_weight=cell.precision.bits_per_weight,
        outcome=Failed(kind="unsupported", message=why) if failed else Skipped(reason=why),
    )
