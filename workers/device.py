"""The device a worker measures on: synchronise, look at the allocator, time steps without a sync."""

import contextlib
import ctypes
import gc
import time
from typing import Protocol

import torch

from schemas.frames import TorchMemory
from schemas.job import Job
from workers.protocol import Unsupported


class StepTimes(Protocol):
    """Marks laid between steps while they are issued, read once they are done."""

    def mark(self) -> None: ...
    def intervals_s(self) -> list[float]: ...


class Device:
    """A CPU, which does a step before the call returns: nothing to wait for, no allocator to ask."""

    def __init__(self, name: str) -> None:
        self.torch = torch.device(name)
        self.name = "CPU"
        self.uuid: str | None = None

    def synchronize(self) -> None:
        """Wait until all issued work is done."""

    def memory(self) -> TorchMemory | None:
        """The caching allocator now, synchronised; its peaks start anew from here."""
        return None

    def release_unused(self) -> None:
        """Give back what loading left behind, so that memory read next is a property of the model."""
        gc.collect()
        # glibc keeps freed blocks for itself; where there is another C library, so be it.
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)

    def step_times(self) -> StepTimes:
        return HostClock()


class HostClock:
    def __init__(self) -> None:
        self.marks_ns: list[int] = []

    def mark(self) -> None:
        self.marks_ns.append(time.monotonic_ns())

    def intervals_s(self) -> list[float]:
        pairs = zip(self.marks_ns, self.marks_ns[1:], strict=False)
        return [(end - start) / 1e9 for start, end in pairs]


class CudaDevice(Device):
    """An NVIDIA GPU, to which work is issued ahead of its being done."""

    def __init__(self, name: str) -> None:
        if not torch.cuda.is_available():
            raise Unsupported(
                f"torch {torch.__version__} sees no CUDA GPU",
                "install a CUDA build of torch that the driver supports, or pass --device cpu",
            )
        self.torch = torch.device(name)
        torch.cuda.set_device(self.torch)
        # With cuDNN's attention allowed, torch's default on Hopper, every length of the KV cache that is new
        # costs some 50 ms a token, once per process; with it off none does. See results/README.md.
        torch.backends.cuda.enable_cudnn_sdp(False)
        properties = torch.cuda.get_device_properties(self.torch)
        self.name = properties.name
        self.uuid = f"GPU-{properties.uuid}"

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch)

    def memory(self) -> TorchMemory:
        self.synchronize()
        stats = torch.cuda.memory_stats(self.torch)
        torch.cuda.reset_peak_memory_stats(self.torch)
        return TorchMemory(
            requested_bytes=stats.get("requested_bytes.all.current", 0),
            allocated_bytes=stats.get("allocated_bytes.all.current", 0),
            active_bytes=stats.get("active_bytes.all.current", 0),
            inactive_split_bytes=stats.get("inactive_split_bytes.all.current", 0),
            reserved_bytes=stats.get("reserved_bytes.all.current", 0),
            peak_allocated_bytes=stats.get("allocated_bytes.all.peak", 0),
            peak_reserved_bytes=stats.get("reserved_bytes.all.peak", 0),
        )

    def release_unused(self) -> None:
        # transformers reserves memory ahead of loading, and quantizing leaves the unquantized behind.
        gc.collect()
        torch.cuda.empty_cache()

    def step_times(self) -> StepTimes:
        return CudaEvents()


class CudaEvents:
    """Events recorded on the stream between kernels: the GPU's own clock, read after the fact."""

    def __init__(self) -> None:
        self.events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append(event)

    def intervals_s(self) -> list[float]:
        pairs = zip(self.events, self.events[1:], strict=False)
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def open_device(job: Job) -> Device:
    """The job's device. Raises `Unsupported` where torch can't use it."""
    return Device("cpu") if job.device == "cpu" else CudaDevice(job.device)
