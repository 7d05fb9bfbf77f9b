"""How a worker talks: frames out on a private descriptor, the Job and acknowledgements in on stdin.

Libraries print to stdout when they please, in Python and in C. So before anything heavy is imported
the worker sets descriptor 1 aside for frames and points the old number at stderr: what others print
lands in the log and can never corrupt a frame.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import msgspec

from schemas.frames import (
    Failed,
    FailureKind,
    Frame,
    Phase,
    PhaseName,
    Prepared,
    Progress,
    TorchMemory,
    Waiting,
)
from schemas.job import Job, decode_job
from workers.models import source as model_source
from workers.quantization.calibration_text import read_note

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PR_SET_PDEATHSIG = 1
OUT_OF_MEMORY = (
    "out of memory",
    "Cannot allocate memory",  # Linux, through torch's allocator on a CPU too
    "CUBLAS_STATUS_ALLOC_FAILED",
    "NVML_SUCCESS == r",  # where a failing NVML call turns torch's own out-of-memory into an internal assert
)
TOLD_ITS_FAILURE = 3
"""Exit status of an errand that has sent its own Failed frame."""


class LoadedModel(NamedTuple):
    """A model on its device in eval mode, and its tokenizer (None for random weights)."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase | None"
    settings: Mapping[str, str] = {}
    """What decides on kernels and can't be read off the model's config, e.g. which of a layer's kernels is
    taken."""
    opaque: tuple[type, ...] = ()
    """Linear layers that torch.compile has to call as they are; see `workers/generation/opaque.py`."""
    summed_rows: int = 1
    """Up to how many rows torch.compile is to multiply by sums; see `workers/generation/compilation.py`."""


Load = Callable[[Job], LoadedModel]
Report = Callable[[str, int, int], None]
"""Told what is being done, and how many of how many are done."""
Prepare = Callable[[Job, Report], None]
Done = Callable[[Job], bool]


class Errand(NamedTuple):
    """What must be done once, before torch is imported and ahead of all measuring."""

    phase: PhaseName
    run: Prepare | None
    is_done: Done


class Unsupported(Exception):
    """This precision can't do what was asked, for a reason that is no bug. `hint` says what can."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class Channel:
    """Both directions of the talk with the parent."""

    def __init__(self, frames: BinaryIO, answers: BinaryIO) -> None:
        self.frames = frames
        self.answers = answers
        self.encoder = msgspec.json.Encoder()

    @classmethod
    def take_over(cls, frames_descriptor: int | None = None) -> "Channel":
        """Set stdin and stdout aside, and send whatever else is printed to stderr."""
        frames = os.dup(1) if frames_descriptor is None else frames_descriptor
        answers = os.dup(0)
        os.dup2(2, 1)
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        return cls(os.fdopen(frames, "wb", buffering=0), os.fdopen(answers, "rb"))

    def send(self, frame: Frame) -> None:
        self.frames.write(self.encoder.encode(frame) + b"\n")

    def report(self, message: str, done: int, total: int) -> None:
        self.send(Progress(message=message, done=done, total=total))

    def enter(self, name: PhaseName, trial: int | None = None, memory: TorchMemory | None = None) -> None:
        """Tell the parent of a phase edge, and wait until it has looked at memory too."""
        self.send(Phase(name=name, at_ns=time.monotonic_ns(), trial=trial, torch=memory))
        self.answers.readline()

    def next_job(self) -> Job | None:
        """Wait for another Job; None where the parent wants no more of this worker."""
        self.send(Waiting())
        line = self.answers.readline()
        return decode_job(line) if line.strip() else None


def main(
    load: Load,
    prepare: Prepare | None = None,
    is_prepared: Done = lambda job: True,
    build: Prepare | None = None,
    is_built: Done = lambda job: True,
    prepared_folder: Callable[[Job], Path] | None = None,
) -> None:
    """Be a worker: read a Job, measure what `load` gives, send frames, go on with the next Job if one comes.

    Exits 0, or 1 where a job failed. With `--prepare` it prepares, says where the result lies, and ends.

    `prepare` makes what `load` needs (converted, calibrated or packed weights) and keeps it in the
    job's cache folder; `build` compiles the precision's kernels, where they come as sources, and keeps
    them. Each runs in a process of its own, so that nothing of it is left in this one when memory is
    measured. `is_prepared` and `is_built` must be cheap: they are asked before torch is imported.
    `prepared_folder` is where the `prepare` of a calibrated precision leaves weights and their note.
    """
    began_ns = time.monotonic_ns()
    _die_with_parent()
    errands: list[Errand] = [
        Errand("prepare", model_source.prepare, model_source.is_prepared),
        Errand("prepare", prepare, is_prepared),
        Errand("build", build, is_built),
    ]
    errand = sys.argv[2] if sys.argv[1:2] == ["--errand"] else None
    only_prepare = sys.argv[1:] == ["--prepare"]
    if only_prepare:
        errands = [each for each in errands if each.phase == "prepare"]
    channel = Channel.take_over(int(sys.argv[3]) if errand else None)
    try:
        job = decode_job(channel.answers.readline())
        if errand:
            _run_errands(errands, errand, job, channel)
            return
        channel.enter("start")
        phases = _phases_to_do(errands, job)
        for phase in phases:
            channel.enter(phase)
            _run_in_own_process(phase, job, channel)
            began_ns = time.monotonic_ns()  # done once and kept, so the budget doesn't count it
        if only_prepare:
            channel.send(_prepared(prepared_folder, job, anew=bool(phases)))
            return
        from workers.harness.measure import measure

        all_measured = measure(job, load, channel, began_ns)
    except Exception as error:
        traceback.print_exc()
        channel.send(describe_failure(error))
        sys.exit(TOLD_ITS_FAILURE if errand else 1)
    if not all_measured:
        sys.exit(1)


def _phases_to_do(errands: list[Errand], job: Job) -> list[PhaseName]:
    phases: list[PhaseName] = []
    for errand in errands:
        # Once one errand of a phase is to be run, those after it may have nothing to look at yet.
        if errand.phase not in phases and not errand.is_done(job):
            phases.append(errand.phase)
    return phases


def _prepared(prepared_folder: Callable[[Job], Path] | None, job: Job, anew: bool) -> Prepared:
    if prepared_folder is None:
        raise Unsupported("its worker does not tell where its calibrated weights lie")
    folder = prepared_folder(job)
    return Prepared(folder=str(folder), calibration=read_note(folder), anew=anew)


def _run_errands(errands: list[Errand], phase: str, job: Job, channel: Channel) -> None:
    for errand in errands:
        if errand.phase == phase and errand.run is not None and not errand.is_done(job):
            errand.run(job, channel.report)


def _run_in_own_process(phase: PhaseName, job: Job, channel: Channel) -> None:
    descriptor = channel.frames.fileno()
    module = sys.modules["__main__"].__spec__.name  # type: ignore[union-attr]
    command = [sys.executable, "-P", "-m", module, "--errand", phase, str(descriptor)]
    done = subprocess.run(command, input=msgspec.json.encode(job) + b"\n", pass_fds=[descriptor])
    if done.returncode == TOLD_ITS_FAILURE:
        sys.exit(1)
    if done.returncode != 0:
        raise RuntimeError(f"phase {phase} ended with status {done.returncode}")


def _die_with_parent() -> None:
    """Ask Linux to end this process when its parent ends, so that no run leaves a model on a GPU."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def describe_failure(error: Exception) -> Failed:
    """Turn an exception into a row of the table: what kind, in one line, and what to do."""
    kind, hint = _classify(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # torch's compiler says first that something was raised, and what it was in the line after.
    message = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    return Failed(
        kind=kind,
        message=message[:300],
        hint=hint,
        traceback="".join(traceback.format_exception(error)),
    )


def _classify(error: Exception) -> tuple[FailureKind, str | None]:
    text = str(error)
    if isinstance(error, Unsupported):
        return "unsupported", error.hint
    if isinstance(error, ModuleNotFoundError):
        name = (error.name or "").split(".")[0]
        return "missing-package", f"pip install {name}" if name else None
    if isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY):
        return "out-of-memory", "take a smaller model, fewer tokens or a smaller batch"
    if "No space left on device" in text:
        return "error", "free some disk, or set QBENCH_CACHE to a folder on a larger one"
    if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
        return "bad-model", "check --model and --checkpoint; the log has the whole message"
    return "error", None
