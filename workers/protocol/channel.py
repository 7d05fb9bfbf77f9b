"""A worker's channel: frames out on a private descriptor, jobs and acknowledgements in on stdin.

Libraries may print to stdout, from Python and from C. So before anything heavy is imported, the worker
duplicates descriptor 1 for frames and redirects the original to stderr: what libraries print goes to the log
and can't corrupt a frame.
"""

import os
import time
from typing import BinaryIO

import msgspec

from schemas.frames import Frame, Phase, PhaseName, Progress, TorchMemory, Waiting
from schemas.job import Job, decode_job


class Channel:
    """Both directions of the communication with the parent."""

    def __init__(self, frames: BinaryIO, answers: BinaryIO) -> None:
        self.frames = frames
        self.answers = answers
        self.encoder = msgspec.json.Encoder()

    @classmethod
    def claim_stdio(cls, frames_descriptor: int | None = None) -> "Channel":
        """Reserve stdin and stdout for the channel, and redirect everything printed to stderr."""
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
        """Report the start of a phase, and wait until the parent has read memory too."""
        self.send(Phase(name=name, at_ns=time.monotonic_ns(), trial=trial, torch=memory))
        self.answers.readline()

    def next_job(self) -> Job | None:
        """Wait for another Job; None if the parent has no more for this worker."""
        self.send(Waiting())
        line = self.answers.readline()
        return decode_job(line) if line.strip() else None
