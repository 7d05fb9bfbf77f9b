"""Watch any program's GPU memory: NVML's figure for its processes, and the figures of torch inside them.

A Python program started here runs an extra thread that reports torch's allocator (`workers/live`); its code
does not change. For a program that is already running, or ignores PYTHONPATH, only NVML's figure is known.
Child processes count toward the program. Processes are listed only twice a second, because listing them
takes a lock in the driver.
"""

import os
import selectors
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import psutil

from orchestrator.errors import BadInput
from orchestrator.hardware.live_reading import LiveReading
from orchestrator.hardware.nvml import NO_PER_PROCESS_MEMORY, Nvml, NvmlUnavailable

HOOK_FOLDER = Path(__file__).resolve().parents[2] / "workers" / "live"
PERIOD_S = 0.5


class TorchLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line from the thread in the program; bytes summed over its GPUs."""

    pid: int
    at_ns: int
    allocated_bytes: int
    reserved_bytes: int


def watch(target: str, nvml: Nvml | None) -> Iterator[LiveReading]:
    """Read twice a second until the program ends; `target` is a pid or a command line.

    Raises `BadInput` if there is no such process or program. A command is terminated when iteration stops.
    """
    if target.isdecimal():
        yield from _follow(_find(int(target)), nvml, None)
        return
    with _started(target) as (process, pipe):
        yield from _follow(process, nvml, pipe)


def _find(pid: int) -> psutil.Process:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        raise BadInput("--live", str(pid), "no such process", "Name a pid or a command") from None


@contextmanager
def _started(command: str) -> Iterator[tuple[psutil.Process, int]]:
    """The program, and the file descriptor on which torch's lines arrive."""
    with tempfile.TemporaryDirectory(prefix="qbench-") as folder:
        path = os.path.join(folder, "torch")
        os.mkfifo(path)
        # Opened for reading and writing, so that neither side blocks until the other opens it.
        pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        paths = [str(HOOK_FOLDER), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "QBENCH_LIVE_PIPE": path,
        }
        try:
            child = subprocess.Popen(shlex.split(command), env=environment)
        except OSError as error:
            raise BadInput("--live", command, f"can't be run: {error.strerror}", "Name a command") from None
        try:
            yield psutil.Process(child.pid), pipe
        finally:
            child.terminate()
            child.wait()
            os.close(pipe)


def _follow(process: psutil.Process, nvml: Nvml | None, pipe: int | None) -> Iterator[LiveReading]:
    lines = _TorchLines(pipe)
    while _is_running(process):
        lines.read(PERIOD_S)
        with suppress(psutil.NoSuchProcess):
            pids = {process.pid, *(child.pid for child in process.children(recursive=True))}
            process_bytes, reason = _process_bytes(nvml, pids)
            yield LiveReading(
                at_ns=time.monotonic_ns(),
                process_bytes=process_bytes,
                reason=reason,
                allocated_bytes=lines.total("allocated_bytes", pids),
                reserved_bytes=lines.total("reserved_bytes", pids),
            )


def _is_running(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _process_bytes(nvml: Nvml | None, pids: set[int]) -> tuple[int | None, str | None]:
    """(bytes that NVML counts for these processes on all GPUs, None), or (None, why that is unknown)."""
    if nvml is None:
        return None, "no NVIDIA GPU available"
    try:
        listed = [entry for gpu in nvml.gpus() for entry in nvml.processes(gpu.uuid)]
    except NvmlUnavailable as error:
        return None, str(error)
    own = [used for pid, used in listed if pid in pids]
    known = [used for used in own if used is not None]
    if not own:
        return (
            None,
            "NVML lists none of its processes: no CUDA context yet, or a container hides its pids",
        )
    if len(known) < len(own):
        return None, NO_PER_PROCESS_MEMORY
    return sum(known), None


class _TorchLines:
    """The latest line from each process."""

    def __init__(self, pipe: int | None) -> None:
        self.pipe = pipe
        self.newest: dict[int, TorchLine] = {}
        self._partial = b""

    def read(self, seconds: float) -> None:
        """Read the lines that arrive within this many seconds."""
        end_s = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            if self.pipe is not None:
                selector.register(self.pipe, selectors.EVENT_READ)
            while (left_s := end_s - time.monotonic()) > 0:
                if self.pipe is None:
                    time.sleep(left_s)
                elif selector.select(left_s):
                    self._decode(os.read(self.pipe, 65_536))

    def total(self, field: str, pids: set[int]) -> int | None:
        values = [getattr(line, field) for pid, line in self.newest.items() if pid in pids]
        return sum(values) if values else None

    def _decode(self, chunk: bytes) -> None:
        *lines, self._partial = (self._partial + chunk).split(b"\n")
        for line in lines:
            decoded = msgspec.json.decode(line, type=TorchLine)
            self.newest[decoded.pid] = decoded
