"""Run real workers on the CPU the way the parent does, and collect everything they send."""

import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread
from typing import NamedTuple, TypeVar

import msgspec
import pytest
from packaging.requirements import Requirement

from orchestrator.precisions.catalog import find_precisions
from orchestrator.precisions.interpreter import (
    lent_packages,
    own_interpreter,
    worker_command,
    worker_environment,
)
from schemas.frames import AnyFrame, Failed, Loaded, Phase, Waiting
from schemas.job import Job, ModelSource, Workload

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["Why is the sky blue?", "Name a river."]
LIMIT_S = 600

F = TypeVar("F", bound=AnyFrame)


class WorkerRun(NamedTuple):
    """A worker's output for a job: `frames` is all of its stdout, since any other line can't be decoded."""

    frames: list[AnyFrame]
    status: int | None
    """Exit status; None while the worker runs."""
    pid: int
    log: str

    def all(self, kind: type[F]) -> list[F]:
        return [frame for frame in self.frames if isinstance(frame, kind)]

    def one(self, kind: type[F]) -> F:
        found = self.all(kind)
        assert len(found) == 1, (kind.__name__, len(found), self.all(Failed), self.log[-2000:])
        return found[0]


def cpu_job(precision: str, model: Path | str, cache: Path, **others: object) -> Job:
    """A small CPU job for a folder, a GGUF file or a random model; `others` are fields of Workload or Job."""
    kind = "random" if isinstance(model, str) else "gguf" if model.suffix == ".gguf" else "folder"
    known = find_precisions()
    needs = known[precision].requirements if precision in known else []
    workload = {"prompts": PROMPTS, "new_tokens": 12}
    workload |= {name: others.pop(name) for name in Workload.__struct_fields__ if name in others}
    return msgspec.structs.replace(
        Job(
            precision=precision,
            model=ModelSource(kind=kind, location=str(model), name=precision),
            workload=Workload(**workload),  # type: ignore[arg-type]
            device="cpu",
            packages=[Requirement(need).name for need in needs],
            cache_folder=str(cache),
        ),
        **others,
    )


@contextmanager
def starting(
    job: Job, module: str, lent: Path | None = None, **variables: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A worker's process and pipes, before its job is sent; killed at the end if it is still running.

    `lent` is a folder with packages `workers` and `schemas` to use instead of the project's; `variables` are
    set in the worker's environment.
    """
    own = own_interpreter()
    with lent_packages() as usual:
        process = subprocess.Popen(
            worker_command(own, module),
            env=worker_environment(own, lent or usual) | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


def run_worker(job: Job, module: str | None = None, lent: Path | None = None) -> WorkerRun:
    """Run one job in its own worker. Its stdin is closed after the job, which acknowledges every phase."""
    with starting(job, module or find_precisions()[job.precision].module, lent) as process:
        out, log = process.communicate(msgspec.json.encode(job) + b"\n", timeout=LIMIT_S)
    frames = msgspec.json.Decoder(AnyFrame).decode_lines(out)
    return WorkerRun(frames, process.returncode, process.pid, log.decode())


class RunningWorker:
    """A worker that keeps its model loaded and accepts one job after another."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.opening: list[AnyFrame] = []
        """The first job's frames, up to Loaded."""

    def run(self, job: Job) -> list[AnyFrame]:
        """The job's frames, up to the worker's request for another."""
        frames: list[AnyFrame] = []
        self._write(msgspec.json.encode(job))
        while not frames or not isinstance(frames[-1], Waiting):
            assert self.process.stdout
            line = self.process.stdout.readline()
            assert line, "the worker ended"
            frames.append(msgspec.json.decode(line, type=AnyFrame))
            if isinstance(frames[-1], Phase):
                self._write(b"")
            if isinstance(frames[-1], Loaded):
                self.opening = list(frames)
        return frames

    def finish(self) -> int:
        """Send no more jobs, and return the exit status."""
        self._write(b"")
        return self.process.wait(LIMIT_S)

    def _write(self, line: bytes) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()


@contextmanager
def running(job: Job, lent: Path | None = None, **variables: str) -> Iterator[RunningWorker]:
    """A worker for jobs with this job's model; its log is discarded."""
    module = find_precisions()[job.precision].module
    with starting(job, module, lent, **variables) as process:
        Thread(target=process.stderr.read, daemon=True).start()  # type: ignore[union-attr]
        yield RunningWorker(process)


def run_jobs(jobs: list[Job], lent: Path | None = None, **variables: str) -> list[WorkerRun]:
    """Run several jobs in one worker, which exits after them; returns the frames of each."""
    with running(jobs[0], lent, **variables) as worker:
        frames = [worker.run(job) for job in jobs]
        status = worker.finish()
        return [WorkerRun(each, status, worker.process.pid, "") for each in frames]


class SharedWorkers:
    """Runs each job once, in a worker that already has the job's model loaded, if there is one.

    So jobs that differ only in their workload share a process, which needs seconds to import torch and
    transformers. Every run begins with its worker's startup frames.
    """

    MAX_ALIVE = 2

    def __init__(self) -> None:
        self.runs: dict[bytes, WorkerRun] = {}
        self.alive: dict[bytes, tuple[RunningWorker, ExitStack]] = {}

    def __call__(self, job: Job) -> WorkerRun:
        key = msgspec.json.encode(job)
        if key not in self.runs:
            self.runs[key] = self._run(job)
        return self.runs[key]

    def finish(self, job: Job) -> int:
        """End the worker of this job's model, and return its exit status."""
        worker, stack = self.alive.pop(_model_key(job))
        with stack:
            return worker.finish()

    def close(self) -> None:
        for _, stack in self.alive.values():
            stack.close()

    def _run(self, job: Job) -> WorkerRun:
        worker = self._worker(job)
        opening = list(worker.opening)
        return WorkerRun(opening + worker.run(job), None, worker.process.pid, "")

    def _worker(self, job: Job) -> RunningWorker:
        key = _model_key(job)
        if key not in self.alive:
            while len(self.alive) >= self.MAX_ALIVE:
                _, stack = self.alive.pop(next(iter(self.alive)))
                stack.close()
            stack = ExitStack()
            self.alive[key] = stack.enter_context(running(job)), stack
        self.alive[key] = self.alive.pop(key)  # the least recently used one comes first, and ends first
        return self.alive[key][0]


@pytest.fixture(scope="session")
def ask() -> Iterator[SharedWorkers]:
    """Run a job once per test session, in a worker shared by all jobs of the same model."""
    workers = SharedWorkers()
    yield workers
    workers.close()


def _model_key(job: Job) -> bytes:
    """Everything in the job but its workload and budget, which identifies what a worker keeps loaded."""
    return msgspec.json.encode(msgspec.structs.replace(job, workload=Workload(prompts=[]), budget_s=None))


def copy_packages(folder: Path, names: Iterable[str] = ("workers", "schemas")) -> Path:
    """Copy the project's packages to `folder`, so that a test can change them."""
    for name in names:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder
