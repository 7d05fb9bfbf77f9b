"""A run: one fresh worker process per precision, each watched from outside while it measures its cells.

The parent sleeps in a `select` between frames, so it takes no core from the worker, whose decode loop
on a fast GPU is bound by the host.
"""

import time
from collections import deque
from contextlib import ExitStack
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from orchestrator.analysis.intervals import FEWEST_ROUNDS
from orchestrator.analysis.rounds import is_precise, rounds_of
from orchestrator.execution.budget import Budget, Pause
from orchestrator.execution.idle_gpu import IdleGpu
from orchestrator.execution.measure_peaks import measure_peaks
from orchestrator.execution.observation import Observation
from orchestrator.execution.out_of_memory import ran_out, why_no_room
from orchestrator.execution.progress import Watcher
from orchestrator.execution.resume import left_of
from orchestrator.execution.worker_process import WorkerProcess
from orchestrator.hardware.nvml import Nvml
from orchestrator.planning.plan import Cell, Plan
from orchestrator.precisions.interpreter import lent_packages, worker_command, worker_environment
from orchestrator.records.store import RunFolder, read_run
from orchestrator.records.timing import measuring_s
from schemas.frames import Done, Failed, Phase, Ready
from schemas.job import Job
from schemas.record import CellRecord, Leftover, Skipped


def run_plan(
    plan: Plan, folder: RunFolder, watcher: Watcher, nvml: Nvml | None, timeout_s: float, explicit: bool
) -> None:
    """Run every cell and keep each record as it ends.

    What the folder holds already stays, and is not measured again. A cell that can't run here is a failure
    where it was asked for by name (`explicit`), else left out.
    """
    before = read_run(folder.path, samples=False)
    left = left_of(plan, before.cells)
    folder.repair(cell.job for cell in left.cells)
    budget = Budget(plan.budget_s, left.cells_to_budget)
    budget.spend(sum(map(measuring_s, before.cells)))
    idle = IdleGpu(nvml)
    with lent_packages(cell.precision for cell in left.cells) as lent, watcher:
        if before.peaks is not None:
            idle.note(before.peaks.ready)
        elif left.runnable:
            # They are the device's, so asked in the parent's own environment where any row runs in it.
            first = min(left.runnable, key=lambda cell: not cell.interpreter.own)
            idle.note(_keep_peaks(first, folder, watcher, lent, timeout_s))
        pause = Pause(plan.cooldown_s)
        too_large = [cell.job for cell in before.cells if cell.job and ran_out(cell)]
        for round_, cells in groupby(left.cells, key=lambda cell: cell.job.round):
            if plan.precise and round_ >= FEWEST_ROUNDS and _is_enough(round_, plan, folder, budget, watcher):
                break
            for _, turn in groupby(cells, key=lambda cell: (cell.precision.name, cell.job.aa_control)):
                queue = deque(turn)
                while queue:
                    with Worker(queue[0], lent, folder, watcher, nvml, timeout_s, idle) as worker:
                        _run_queue(queue, worker, plan, budget, pause, explicit, too_large)


def _is_enough(round_: int, plan: Plan, folder: RunFolder, budget: Budget, watcher: Watcher) -> bool:
    """Whether `--precise` wants no further round: its intervals are narrow, or the budget is spent.

    A round that was begun before the run was interrupted is ended all the same.
    """
    run = read_run(folder.path, samples=False)
    if round_ < rounds_of(run):
        return False
    if is_precise(run, plan.precise or 0):
        watcher.say(f"every interval is within {plan.precise:.1%} after {rounds_of(run)} rounds")
        return True
    if budget.left_s is not None and budget.left_s <= 0:
        watcher.say(f"the budget is spent after {rounds_of(run)} rounds; some intervals are wider than asked")
        return True
    return False


def _run_queue(
    queue: deque[Cell],
    worker: "Worker",
    plan: Plan,
    budget: Budget,
    pause: Pause,
    explicit: bool,
    too_large: list[Job],
) -> None:
    """Take cells off the queue for as long as `worker` is of use.

    Those that run out of memory are added to `too_large`, and none that is larger is tried.
    """
    while queue and worker.usable:
        cell = queue.popleft()
        if cell.why_not is not None:
            worker.folder.append(_not_run(cell, cell.why_not, explicit))
            continue
        share_s = budget.next_share_s()
        if no_room := why_no_room(cell.job, too_large):
            worker.folder.append(_not_run(cell, no_room, False))
            continue
        if share_s is not None and share_s <= 0:
            worker.folder.append(_not_run(cell, f"the budget of {plan.budget_s:g} s is spent", False))
            continue
        pause.wait()
        job = msgspec.structs.replace(cell.job, budget_s=share_s)
        record = worker.measure(cell._replace(job=job))
        worker.folder.append(record)
        budget.spend(measuring_s(record))
        if ran_out(record):
            too_large.append(job)


class Worker:
    """One precision's process, started by its first cell, and given one cell after another.

    It is usable until it ends by itself: after a crash, a deadline, or a failure that leaves its device in
    doubt the cells that remain are for a fresh one.
    """

    def __init__(
        self,
        first: Cell,
        lent: Path,
        folder: RunFolder,
        watcher: Watcher,
        nvml: Nvml | None,
        timeout_s: float,
        idle: IdleGpu | None = None,
    ) -> None:
        self.precision = first.precision
        self.command = worker_command(first.interpreter, first.precision.module)
        self.environment = worker_environment(first.interpreter, lent)
        self.folder = folder
        self.watcher = watcher
        self.nvml = nvml
        self.timeout_s = timeout_s
        self.idle = idle or IdleGpu(None)
        self.leftover: Leftover | None = None
        self.usable = True
        self._process: WorkerProcess | None = None
        self._could_not_load: Failed | None = None
        self.seen: Observation
        self.log: Path
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def measure(self, cell: Cell) -> CellRecord:
        """Measure one cell to its end, and gather all that was said and seen of it."""
        self.watcher.begin(cell.job)
        if self._could_not_load is not None:
            record = self._record(cell, self._could_not_load)
            self.watcher.end(record)
            return record
        started_at = datetime.now(UTC).isoformat(timespec="seconds")
        began_ns = time.monotonic_ns()
        process = self._give(cell)
        for frame in process.frames(self.timeout_s):
            if frame is not None:
                self.seen.take(frame)
            if isinstance(frame, Phase):
                process.acknowledge()
            self.watcher.see(frame, self.seen.latest)
        record = self._record(
            cell,
            self.seen.outcome,
            started_at=started_at,
            began_ns=began_ns,
            wall_s=(time.monotonic_ns() - began_ns) / 1e9,
        )
        self.watcher.end(record)
        self._settle(self.seen.outcome, process)
        return record

    def _give(self, cell: Cell) -> WorkerProcess:
        if self._process is not None:
            self.seen.begin_cell()
            self._process.send(cell.job)
            return self._process
        self.leftover = self.idle.wait()
        # The observation first: it reads how much of the GPU is in use before there is a worker.
        self.log = self.folder.new_log(self.precision.name)
        self.seen = self._stack.enter_context(Observation(cell.job.device, self.nvml))
        self._process = self._stack.enter_context(
            WorkerProcess(self.command, self.environment, cell.job, self.log)
        )
        self.seen.watch_resident_set(self._process.pid)
        return self._process

    def _settle(self, outcome: Done | Failed, process: WorkerProcess) -> None:
        """Find out what the worker is still good for."""
        waits = process.waits_for_more()
        self.idle.note(self.seen.ready)
        if isinstance(outcome, Failed) and not self.seen.is_loaded:
            self._could_not_load = outcome
        else:
            self.usable = waits

    def _record(
        self,
        cell: Cell,
        outcome: Done | Failed,
        started_at: str | None = None,
        began_ns: int | None = None,
        wall_s: float | None = None,
    ) -> CellRecord:
        seen = self.seen
        return CellRecord(
            precision=cell.precision.name,
            label=cell.precision.label,
            bits_per_weight=cell.precision.bits_per_weight,
            outcome=outcome,
            job=cell.job,
            started_at=started_at,
            began_ns=began_ns,
            wall_s=wall_s,
            ready=seen.ready,
            loaded=seen.loaded,
            setup=seen.setup,
            warmed_up=seen.warmed_up,
            edges=seen.edges,
            trials=seen.trials,
            profile=seen.profile,
            samples=seen.samples,
            baseline_device_bytes=seen.baseline_device_bytes,
            leftover=self.leftover,
            nvml_uuid=seen.nvml_uuid,
            sampler=seen.sampler.stats() if seen.sampler else None,
            log=f"logs/{self.log.name}",
        )


def _keep_peaks(
    cell: Cell, folder: RunFolder, watcher: Watcher, lent: Path, timeout_s: float
) -> Ready | None:
    """Measure the device's peaks, and tell which device that was."""
    watcher.say("measuring the device's peaks")
    cache_folder = Path(cell.job.cache_folder)
    log = folder.new_log("peaks")
    peaks = measure_peaks(cell.interpreter, cell.job.device, cache_folder, lent, log, timeout_s)
    folder.keep_peaks(peaks)
    return peaks.ready


def _not_run(cell: Cell, why: str, failed: bool) -> CellRecord:
    return CellRecord(
        precision=cell.precision.name,
        label=cell.precision.label,
        bits_per_weight=cell.precision.bits_per_weight,
        outcome=Failed(kind="unsupported", message=why) if failed else Skipped(reason=why),
        job=cell.job,
    )
