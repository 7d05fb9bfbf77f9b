"""A run: one new worker process per precision and round, watched from outside while it measures its cells.

The parent sleeps in a `select` between frames, so it takes no core from the worker, whose decode loop on a
fast GPU is limited by the host.
"""

from collections import deque
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from msgspec.structs import replace

from orchestrator.analysis.rounds import is_precise, rounds_of
from orchestrator.analysis.verdicts import FEWEST_ROUNDS
from orchestrator.execution.budget import Budget, Pause
from orchestrator.execution.cell_worker import CellWorker, RunContext, not_run
from orchestrator.execution.idle_gpu import IdleGpu
from orchestrator.execution.measure_peaks import PEAKS_WORKER, measure_peaks
from orchestrator.execution.out_of_memory import ran_out, why_no_room
from orchestrator.execution.progress import Watcher
from orchestrator.execution.worker_session import WorkerStart
from orchestrator.hardware.nvml import Nvml
from orchestrator.planning.plan import Cell, Plan
from orchestrator.precisions.interpreter import lent_packages
from orchestrator.records.store import RunFolder
from orchestrator.records.timing import measuring_s
from schemas.frames import Failed, Ready
from schemas.job import Job
from schemas.record import CellRecord, Run, Skipped


def run_plan(left: Plan, begun: Run, folder: RunFolder, watcher: Watcher, nvml: Nvml | None) -> None:
    """Run the cells of `left`, and keep each record as it ends. `begun` is the run in the folder so far."""
    folder.repair(len(begun.cells), (cell.job for cell in left.cells))
    with lent_packages(cell.precision for cell in left.cells) as lent, watcher:
        context = RunContext(folder, watcher, nvml, IdleGpu(nvml), lent, left.timeout_s)
        context.idle.note(_device(left, begun, context))
        rest = RestOfRun(left, begun, context)
        for round_, cells in groupby(left.cells, key=lambda cell: cell.job.round):
            if rest.is_enough(round_):
                break
            rest.run_round(cells)


def _device(left: Plan, begun: Run, context: RunContext) -> Ready | None:
    """The worker that measured the device's peaks, now or before, which reported the device."""
    if begun.peaks is not None:
        return begun.peaks.ready
    if not left.runnable:
        return None
    context.watcher.say("measuring the device's peaks")
    # Peaks belong to the device, so they are measured in the parent's own environment if any cell runs in it.
    first = min(left.runnable, key=lambda cell: not cell.interpreter.own)
    start = WorkerStart(first.interpreter, PEAKS_WORKER, context.lent, context.folder.new_log("peaks"))
    peaks = measure_peaks(start, first.job.device, Path(first.job.cache_folder), context.timeout_s)
    context.folder.write_peaks(peaks)
    return peaks.ready


class RestOfRun:
    """The cells still to measure, the budget left for them, and the workloads that proved too large."""

    def __init__(self, left: Plan, begun: Run, context: RunContext) -> None:
        self.plan = left
        self.begun = begun
        self.context = context
        self.budget = Budget(left.budget_s, left.cells_to_budget)
        self.pause = Pause(left.cooldown_s)
        self.finished: list[CellRecord] = []
        self.too_large: list[Job] = []
        for record in begun.cells:
            self._count(record)

    def is_enough(self, round_: int) -> bool:
        """Whether `--precise` needs no further round: its intervals are narrow, or the budget is spent.

        A round that was begun before the run was interrupted is always finished.
        """
        run = replace(self.begun, cells=self.finished)
        if not self.plan.precise or round_ < max(FEWEST_ROUNDS, rounds_of(run)):
            return False
        if is_precise(run, self.plan.precise):
            within = f"every interval is within {self.plan.precise:.1%}"
            self.context.watcher.say(f"{within} after {rounds_of(run)} rounds")
            return True
        if self.budget.left_s is not None and self.budget.left_s <= 0:
            spent = f"the budget is spent after {rounds_of(run)} rounds"
            self.context.watcher.say(f"{spent}; some intervals are wider than requested")
            return True
        return False

    def run_round(self, cells: Iterable[Cell]) -> None:
        """Run the cells of one round: those of a precision in one worker, or in several if it fails."""
        for _, turn in groupby(cells, key=lambda cell: (cell.precision.name, cell.job.aa_control)):
            queue = deque(turn)
            while queue:
                with CellWorker(queue[0], self.context) as worker:
                    while queue and worker.usable:
                        self._keep(self._run_cell(queue.popleft(), worker))

    def _run_cell(self, cell: Cell, worker: CellWorker) -> CellRecord:
        if cell.why_not is not None:
            return not_run(cell, self._unavailable(cell.why_not))
        share_s = self.budget.next_share_s()
        if why := why_no_room(cell.job, self.too_large):
            return not_run(cell, Skipped(reason=why))
        if share_s is not None and share_s <= 0:
            return not_run(cell, Skipped(reason=f"the budget of {self.plan.budget_s:g} s is spent"))
        self.pause.wait()
        return worker.measure(cell._replace(job=replace(cell.job, budget_s=share_s)))

    def _unavailable(self, why: str) -> Failed | Skipped:
        """A precision that can't run here: a failure if it was requested by name."""
        return Failed(kind="unsupported", message=why) if self.plan.explicit else Skipped(reason=why)

    def _keep(self, record: CellRecord) -> None:
        self.context.folder.append(record)
        self._count(replace(record, samples=[]))

    def _count(self, record: CellRecord) -> None:
        self.finished.append(record)
        self.budget.spend(measuring_s(record))
        if record.job is not None and ran_out(record):
            self.too_large.append(record.job)
