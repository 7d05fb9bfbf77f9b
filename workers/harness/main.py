"""A worker's main program: read Jobs, prepare what is missing, measure, send frames."""

import contextlib
import ctypes
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from schemas.frames import PhaseName, Prepared
from schemas.job import Job, decode_job
from workers.models import source
from workers.protocol.backend import Backend, Report
from workers.protocol.channel import Channel
from workers.protocol.errors import Unsupported, describe_failure
from workers.quantization.calibration_text import read_note

PR_SET_PDEATHSIG = 1
SENT_ITS_FAILURE = 3
"""Exit status of a setup process that has sent its own Failed frame."""


class SetupStep(NamedTuple):
    """Something to do once, before torch is imported and anything is measured."""

    phase: PhaseName
    run: Callable[[Job, Report], None] | None
    is_done: Callable[[Job], bool]


def main(backend: Backend) -> None:
    """Run a worker: read a Job, measure the model that `backend` loads, send frames, repeat for further Jobs.

    Exits 0, or 1 if a job failed. With `--prepare` it only prepares, and reports where the result is.
    """
    began_ns = time.monotonic_ns()
    _die_with_parent()
    setup_phase = sys.argv[2] if sys.argv[1:2] == ["--setup"] else None
    only_prepare = sys.argv[1:] == ["--prepare"]
    steps = setup_steps(backend, only_prepare)
    channel = Channel.claim_stdio(int(sys.argv[3]) if setup_phase else None)
    try:
        job = decode_job(channel.answers.readline())
        if setup_phase:
            _run_steps(steps, setup_phase, job, channel)
            return
        channel.enter("start")
        phases = phases_to_do(steps, job)
        for phase in phases:
            channel.enter(phase)
            _run_in_own_process(phase, job, channel)
            began_ns = time.monotonic_ns()  # the result is kept, so it doesn't count against the budget
        if only_prepare:
            channel.send(_prepared(backend, job, anew=bool(phases)))
            return
        from workers.harness.measure import measure

        all_measured = measure(job, backend.load, channel, began_ns)
    except Exception as error:
        traceback.print_exc()
        channel.send(describe_failure(error))
        sys.exit(SENT_ITS_FAILURE if setup_phase else 1)
    if not all_measured:
        sys.exit(1)


def setup_steps(backend: Backend, only_prepare: bool) -> list[SetupStep]:
    steps = [
        SetupStep("prepare", source.prepare, source.is_prepared),
        SetupStep("prepare", backend.prepare, backend.is_prepared),
        SetupStep("build", backend.build, backend.is_built),
    ]
    return [step for step in steps if step.phase == "prepare" or not only_prepare]


def phases_to_do(steps: list[SetupStep], job: Job) -> list[PhaseName]:
    phases: list[PhaseName] = []
    for step in steps:
        # Once a step of a phase has to run, `is_done` of later steps may have nothing to look at yet.
        if step.phase not in phases and not step.is_done(job):
            phases.append(step.phase)
    return phases


def _run_steps(steps: list[SetupStep], phase: str, job: Job, channel: Channel) -> None:
    for step in steps:
        if step.phase == phase and step.run is not None and not step.is_done(job):
            step.run(job, channel.report)


def _run_in_own_process(phase: PhaseName, job: Job, channel: Channel) -> None:
    descriptor = channel.frames.fileno()
    module = sys.modules["__main__"].__spec__.name  # type: ignore[union-attr]
    command = [sys.executable, "-P", "-m", module, "--setup", phase, str(descriptor)]
    finished = subprocess.run(command, input=msgspec.json.encode(job) + b"\n", pass_fds=[descriptor])
    if finished.returncode == SENT_ITS_FAILURE:
        sys.exit(1)
    if finished.returncode != 0:
        raise RuntimeError(f"phase {phase} exited ({finished.returncode}) without a result")


def _prepared(backend: Backend, job: Job, anew: bool) -> Prepared:
    if backend.prepared_folder is None:
        raise Unsupported("this worker doesn't say where its calibrated weights are")
    folder = backend.prepared_folder(job)
    return Prepared(folder=str(folder), calibration=read_note(folder), anew=anew)


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends, so that no run leaves a model on a GPU."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
