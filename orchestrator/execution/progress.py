"""Progress of a run, on stderr: a live line on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from orchestrator.analysis.metrics import end_to_end_tok_s, measure_cell
from orchestrator.records.keys import key_of
from orchestrator.records.names import cell_namer
from orchestrator.units import counted, duration, mib, rate
from schemas.frames import AnyFrame, Done, Phase, Progress, Trial
from schemas.job import Job
from schemas.record import CellRecord, MemoryReading

SETUP_MESSAGES = {
    "prepare": "preparing weights, once for this model",
    "build": "building kernels, once for this machine",
}


class Watcher:
    """Follows a run and prints plain lines: one when a cell begins, one when it ends."""

    def __init__(
        self,
        console: Console,
        cells: int,
        begun: int = 0,
        name: Callable[[Job], str] = lambda job: key_of(job).name,
    ) -> None:
        self.console = console
        self.cells = cells
        self.begun = begun
        self.name = name
        self.finished_s: list[float] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def begin(self, job: Job) -> None:
        """A cell has begun."""
        self.job = job
        self.begun += 1
        self.began_s = time.monotonic()
        self.trials: list[Trial] = []
        self.phase = "start"
        self.say(f"{self._position()} {self.name(job)}: started")

    def see(self, frame: AnyFrame | None, reading: MemoryReading | None) -> None:
        """Follow the cell: a frame, or None for a tick without one, and the latest memory reading."""
        if isinstance(frame, Phase):
            self.phase = frame.name
            if frame.name in SETUP_MESSAGES:
                self.say(f"{self._position()} {self.name(self.job)}: {SETUP_MESSAGES[frame.name]}")
        elif isinstance(frame, Progress) and frame.total:
            self.phase = f"{frame.message} {frame.done}/{frame.total}"
        elif isinstance(frame, Trial):
            self.trials.append(frame)

    def end(self, record: CellRecord) -> None:
        """The cell has ended."""
        took_s = time.monotonic() - self.began_s
        self.finished_s.append(took_s)
        row = measure_cell(record)
        if isinstance(record.outcome, Done):
            result = f"decode {rate(row.decode_tok_s)} tok/s, {counted(row.trials, 'trial')}"
        else:
            result = f"failed, {row.reason}"
        self.say(f"{self._position()} {self.name(self.job)}: {result}, {duration(took_s)}")

    def say(self, line: str) -> None:
        """Print a line, never wrapped."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _position(self) -> str:
        return f"[{self.begun}/{self.cells}]"


class LiveWatcher(Watcher):
    """A terminal line that is redrawn: precision, phase, tok/s so far, memory now, time left."""

    def __enter__(self) -> Self:
        self.live = Live(Text(""), console=self.console, refresh_per_second=8, transient=True)
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.live.stop()

    def see(self, frame: AnyFrame | None, reading: MemoryReading | None) -> None:
        super().see(frame, reading)
        parts = [f"{self._position()} {self.name(self.job)}", self.phase]
        if self.trials:
            parts.append(f"{rate(end_to_end_tok_s(self.trials))} tok/s")
            parts.append(f"trial {len(self.trials)}/{self._trials_planned()}")
        if reading is not None:
            name, value = ("RSS", reading.process_bytes)
            if reading.device_bytes is not None:
                name, value = ("VRAM", reading.device_bytes)
            parts.append(f"{name} {mib(value)} MiB")
        left_s = self._time_left_s()
        if left_s is not None:
            parts.append(f"~{duration(left_s)} left")
        else:
            parts.append(f"{duration(time.monotonic() - self.began_s)} so far")
        self.live.update(Text(" · ".join(parts), no_wrap=True, overflow="ellipsis"))

    def _trials_planned(self) -> int:
        workload = self.job.workload
        return -(-len(workload.prompts) // workload.batch_size)

    def _time_left_s(self) -> float | None:
        """For this cell, based on its trials so far; for the others, on the cells so far."""
        elapsed_s = time.monotonic() - self.began_s
        cell_s = None
        if self.job.budget_s is not None:
            cell_s = max(self.job.budget_s, elapsed_s)
        if self.trials:
            trial_s = sum(trial.prefill_s + trial.decode_s for trial in self.trials) / len(self.trials)
            estimate_s = elapsed_s + trial_s * (self._trials_planned() - len(self.trials))
            cell_s = estimate_s if cell_s is None else min(cell_s, estimate_s)
        if cell_s is None:
            return None
        typical_s = max([cell_s, *self.finished_s])
        return cell_s - elapsed_s + (self.cells - self.begun) * typical_s


def make_watcher(console: Console, jobs: Collection[Job], begun: int) -> Watcher:
    """A live watcher if the console is a terminal, for a run of these jobs, `begun` of them done."""
    kind = LiveWatcher if console.is_terminal else Watcher
    return kind(console, len(jobs), begun, cell_namer(jobs))
