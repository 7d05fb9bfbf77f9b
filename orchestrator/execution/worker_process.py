"""One worker process: started, read from, and ended together with everything it started.

The worker runs in a new session, so that Ctrl-C in the terminal reaches only the parent, and the parent can
end the worker's whole process group: terminate, wait, kill. A worker's stdout carries only frames; its stderr
is a log file.
"""

import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import msgspec

from schemas.frames import AnyFrame, Done, Failed, Peaks, Prepared, Waiting
from schemas.job import Job

GRACE_S = 3.0
"""How long a worker may take to exit on request."""
SIGNAL_NAMES = {number.value: number.name for number in signal.Signals}


class WorkerProcess:
    """A running worker, ended at the end of a `with`."""

    def __init__(self, command: list[str], environment: dict[str, str], job: Job, log: Path | None) -> None:
        self.command = command
        self.environment = environment
        self.job = job
        self.log = log
        self.decoder: msgspec.json.Decoder[AnyFrame] = msgspec.json.Decoder(AnyFrame)
        self._read = b""
        """Bytes received but not yet returned as frames."""

    def __enter__(self) -> Self:
        with self.log.open("wb") if self.log else nullcontext() as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,  # None: the parent's own
                start_new_session=True,
            )
        self.send(self.job)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A worker that sent its result may take a moment to unload; its children get no grace period. If it
        # has not read its job, closing the pipe would block.
        if error is None and not self.sending.is_alive():
            self._close(self.process.stdin)
            self._wait(GRACE_S)
        self._signal_group(signal.SIGTERM)
        self._wait(GRACE_S)
        self._signal_group(signal.SIGKILL)
        self.process.wait()
        self.sending.join(GRACE_S)
        if not self.sending.is_alive():
            self._close(self.process.stdin)
        self._close(self.process.stdout)

    @property
    def pid(self) -> int:
        return self.process.pid

    def send(self, job: Job) -> None:
        """Send the worker a job: its first, or another once it waits for more."""
        # In a thread, since a job may be longer than the pipe's buffer and the worker slow to read it, or
        # hung; `frames` enforces the deadline.
        line = msgspec.json.encode(job) + b"\n"
        sending = threading.Thread(target=self._write, args=(line,), name="send-job", daemon=True)
        sending.start()
        self.sending = sending  # only now: after a Ctrl-C before the start, it could not be joined

    def waits_for_more(self, timeout_s: float = 10.0) -> bool:
        """Whether the worker, its job done or failed, can take another; it may free memory first."""
        for frame in self.frames(timeout_s):
            if frame is not None:
                return isinstance(frame, Waiting)
        return False

    def acknowledge(self) -> None:
        """Let the worker continue from a phase edge."""
        self._write(b"\n")

    def frames(self, timeout_s: float, tick_s: float = 0.25) -> Iterator[AnyFrame | None]:
        """The worker's frames up to Done, Peaks, Prepared or Failed; None for each `tick_s` without a frame.

        If the worker crashes, hangs or sends an invalid frame, the last one is a Failed made here.
        """
        deadline_s = time.monotonic() + timeout_s
        for line in self._lines(tick_s):
            if time.monotonic() > deadline_s:
                yield Failed(
                    kind="timeout",
                    message=f"no result within {timeout_s:g} s",
                    hint="raise --timeout, or lower --new-tokens",
                )
                return
            if line is None:
                yield None
                continue
            frame = self._decode(line)
            yield frame
            if isinstance(frame, Done | Peaks | Prepared | Failed):
                return
        yield self._describe_exit()

    def _lines(self, tick_s: float) -> Iterator[bytes | None]:
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        ended = False
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while True:
                while b"\n" in self._read:
                    line, _, self._read = self._read.partition(b"\n")
                    yield line
                if not selector.select(tick_s):
                    if ended:  # nothing is left to read, though a child of the worker may still hold the pipe
                        return
                    ended = self.process.poll() is not None
                    yield None
                    continue
                chunk = os.read(descriptor, 65_536)
                if not chunk:
                    return
                self._read += chunk

    def _decode(self, line: bytes) -> AnyFrame:
        try:
            return self.decoder.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            return Failed(kind="crashed", message=f"the worker sent an invalid frame: {error}")

    def _describe_exit(self) -> Failed:
        status = self.process.wait()
        if status >= 0:
            return Failed(kind="crashed", message=f"the worker exited ({status}) without a result")
        name = SIGNAL_NAMES.get(-status, f"signal {-status}")
        hint = "the kernel kills processes that use too much memory: see dmesg" if name == "SIGKILL" else None
        return Failed(kind="crashed", message=f"the worker was killed by {name}", hint=hint)

    def _write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        # The worker has exited, or we closed the pipe: its frames, or their absence, will show which.
        with suppress(BrokenPipeError, ValueError):
            self.process.stdin.write(data)
            self.process.stdin.flush()

    @staticmethod
    def _close(pipe: IO[bytes] | None) -> None:
        if pipe is not None:
            with suppress(BrokenPipeError):  # data that a dead worker did not read
                pipe.close()

    def _signal_group(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _wait(self, timeout_s: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
