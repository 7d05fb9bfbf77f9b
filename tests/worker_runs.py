"""Workers run as the parent runs them, with everything that came out of them: shared by several tests."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import NamedTuple, TypeVar

import msgspec
from packaging.requirements import Requirement

from orchestrator.precisions.catalog import find_precisions
from orchestrator.precisions.interpreter import (
    lent_packages,
    own_interpreter,
    worker_command,
    worker_environment,
)
from schemas.frames import AnyFrame, Failed, Phase, Waiting
from schemas.job import Job, ModelSource, Workload

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["Why is the sky blue?", "Name a river."]
LIMIT_S = 600

F = TypeVar("F", bound=AnyFrame)


class WorkerRun(NamedTuple):
    """A worker that has ended. `frames` is all of its stdout: a line that is no frame can't be decoded."""

    frames: list[AnyFrame]
    status: int
    pid: int
    log: str

    def all(self, kind: type[F]) -> list[F]:
        return [frame for frame in self.frames if isinstance(frame, kind)]

    def one(self, kind: type[F]) -> F:
        found = self.all(kind)
        assert len(found) == 1, (kind.__name__, len(found), self.all(Failed), self.log[-2000:])
        return found[0]


def make_job(precision: str, model: Path | str, cache: Path, **others: object) -> Job:
    """A small job for a folder, a GGUF file or a random name; `others` are fields of Workload or Job."""
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
    """A worker's process with its pipes, the job not sent yet; killed at the end if it still runs.

    `lent` holds the packages `workers` and `schemas` where they shall not be the project's; `variables` are
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
    """Run one worker to its end. Its stdin is closed after the job, which stands for all acknowledgements."""
    with starting(job, module or find_precisions()[job.precision].module, lent) as process:
        out, log = process.communicate(msgspec.json.encode(job) + b"\n", timeout=LIMIT_S)
    frames = msgspec.json.Decoder(AnyFrame).decode_lines(out)
    return WorkerRun(frames, process.returncode, process.pid, log.decode())


def run_jobs(jobs: list[Job], lent: Path | None = None, **variables: str) -> list[WorkerRun]:
    """Run several jobs in one worker, which ends after them; the frames of each."""
    module = find_precisions()[jobs[0].precision].module
    with starting(jobs[0], module, lent, **variables) as process, tempfile.TemporaryFile() as log:
        Thread(target=shutil.copyfileobj, args=(process.stderr, log), daemon=True).start()
        runs = [_run_job(process, job) for job in jobs]
        process.stdin.write(b"\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        status = process.wait(LIMIT_S)
        return [WorkerRun(frames, status, process.pid, "") for frames in runs]


def _run_job(process: subprocess.Popen[bytes], job: Job) -> list[AnyFrame]:
    assert process.stdin
    assert process.stdout
    frames: list[AnyFrame] = []
    line = msgspec.json.encode(job)
    while not frames or not isinstance(frames[-1], Waiting):
        if not frames or isinstance(frames[-1], Phase):  # the job, and a line for every phase edge
            process.stdin.write(line + b"\n")
            process.stdin.flush()
            line = b""
        said = process.stdout.readline()
        assert said, "the worker ended"
        frames.append(msgspec.json.decode(said, type=AnyFrame))
    return frames


def kept(run: Callable[..., WorkerRun] = run_worker) -> Callable[..., WorkerRun]:
    """`run` with a memory: the same job is run once, however many tests look at it."""
    runs: dict[bytes, WorkerRun] = {}

    def ask(job: Job) -> WorkerRun:
        key = msgspec.json.encode(job)
        if key not in runs:
            runs[key] = run(job)
        return runs[key]

    return ask


def copy_packages(folder: Path, names: Iterable[str] = ("workers", "schemas")) -> Path:
    """The project's packages copied to `folder`, for a test to add files to."""
    for name in names:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, **changes}
