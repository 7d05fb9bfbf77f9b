"""How a worker talks: frames out on a private descriptor, the Job and acknowledgements in on stdin.

Libraries print to stdout when they please, in Python and in C. So before anything heavy is imported
the worker sets descriptor 1 aside for frames and points the old number at stderr: what others print
lands in the log and can never corrupt a frame.
"""

import os
import time
from typing import BinaryIO

import msgspec

from schemas.frames import Frame, Phase, PhaseName, Progress, TorchMemory, Waiting
from schemas.job import Job, decode_job


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
