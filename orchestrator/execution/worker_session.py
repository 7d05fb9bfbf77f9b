"""A worker followed from its first job to its last: its frames, each with memory as seen from outside.

Every worker is started through a session, which also acknowledges its phase edges. The frames are left to the
caller.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from orchestrator.execution.observation import Observation
from orchestrator.execution.worker_process import WorkerProcess
from orchestrator.hardware.nvml import Nvml
from orchestrator.planning.plan import Cell
from orchestrator.precisions.interpreter import (
    Interpreter,
    lent_packages,
    worker_command,
    worker_environment,
)
from schemas.frames import AnyFrame, Phase
from schemas.job import Job
from schemas.record import MemoryReading


class WorkerStart(NamedTuple):
    """How to start a worker."""

    interpreter: Interpreter
    module: str
    lent: Path
    """The folder of `lent_packages`."""
    log: Path | None = None
    """The file for its stderr; None: the parent's own stderr."""
    arguments: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        return [*worker_command(self.interpreter, self.module), *self.arguments]

    @property
    def environment(self) -> dict[str, str]:
        return worker_environment(self.interpreter, self.lent)


class Event(NamedTuple):
    """A frame, or None after a tick without one, and the latest memory reading."""

    frame: AnyFrame | None
    memory: MemoryReading | None


class WorkerSession:
    """A worker, started by its first job and stopped at the end of a `with`.

    `sample_memory=False` leaves it undisturbed while it times the device.
    """

    def __init__(
        self, start: WorkerStart, timeout_s: float, nvml: Nvml | None = None, sample_memory: bool = True
    ) -> None:
        self.start = start
        self.timeout_s = timeout_s
        self.nvml = nvml
        self.sample_memory = sample_memory
        self.seen: Observation
        """The observation of the worker; set by its first job."""
        self._process: WorkerProcess | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    @property
    def is_started(self) -> bool:
        return self._process is not None

    def events(self, job: Job) -> Iterator[Event]:
        """Give the worker a job, and yield its frames up to the result."""
        process = self._give(job)
        for frame in process.frames(self.timeout_s):
            if frame is not None:
                self.seen.add(frame)
            if isinstance(frame, Phase):
                process.acknowledge()
                yield Event(frame, self.seen.edges[-1].reading)
            else:
                yield Event(frame, self.seen.latest)

    def waits_for_more(self) -> bool:
        """Whether the worker, its job done or failed, can take another."""
        return self._process is not None and self._process.waits_for_more()

    def _give(self, job: Job) -> WorkerProcess:
        if self._process is not None:
            self.seen.begin_cell()
            self._process.send(job)
            return self._process
        # The observation first: it reads how much of the GPU is in use before the worker starts.
        self.seen = self._stack.enter_context(Observation(job.device, self.nvml))
        process = WorkerProcess(self.start.command, self.start.environment, job, self.start.log)
        self._process = self._stack.enter_context(process)
        if self.sample_memory:
            self.seen.watch_resident_set(process.pid)
        return process


@contextmanager
def separate_start(
    cell: Cell, log: Path | None = None, arguments: tuple[str, ...] = ()
) -> Iterator[WorkerStart]:
    """How to start the cell's worker outside a run, with packages lent to it alone."""
    with lent_packages([cell.precision]) as lent:
        yield WorkerStart(cell.interpreter, cell.precision.module, lent, log, arguments)
