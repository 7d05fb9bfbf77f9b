"""The device a worker measures on: synchronizing, allocator statistics, and timing steps without syncing."""

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable
from typing import Protocol

import torch

from schemas.frames import TorchMemory
from schemas.job import Job
from workers.generation.cuda_graph import record_graph
from workers.protocol.errors import Unsupported


class StepTimes(Protocol):
    """Marks set between steps as they are issued, and read once they are done."""

    def mark(self) -> None: ...
    def intervals_s(self) -> list[float]: ...


class Device:
    """A CPU: a step is done when its call returns, so there is nothing to wait for; no caching allocator."""

    def __init__(self, name: str) -> None:
        self.torch = torch.device(name)
        self.name = "CPU"
        self.uuid: str | None = None

    def synchronize(self) -> None:
        """Wait until all issued work is done."""

    def is_usable(self) -> bool:
        """Whether measuring can continue; after some CUDA errors it can't in this process."""
        return True

    def memory(self) -> TorchMemory | None:
        """Statistics of the caching allocator after synchronizing. Resets its peaks."""
        return None

    def initialize_cublas(self, dtype: torch.dtype) -> None:
        """Multiply once, so that cuBLAS's own memory is measured separately from the model's."""

    def release_unused(self) -> None:
        """Free what loading left behind, so that the next reading of memory shows only the model."""
        gc.collect()
        # glibc caches freed blocks. Other C libraries lack this function.
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)

    def step_times(self) -> StepTimes:
        return HostClock()

    def replayable(self, step: Callable[[], None], compiled: bool) -> Callable[[], None]:
        """`step` as a CUDA graph, with one launch instead of a thousand; on a CPU, a compiled `step` itself.

        Raises `Unsupported` if `step` waits for the GPU, because a graph replays without the host.
        """
        if not compiled:
            raise Unsupported("CUDA graphs need an NVIDIA GPU", "use --decode eager or compile")
        return step


class HostClock:
    def __init__(self) -> None:
        self.marks_ns: list[int] = []

    def mark(self) -> None:
        self.marks_ns.append(time.monotonic_ns())

    def intervals_s(self) -> list[float]:
        pairs = zip(self.marks_ns, self.marks_ns[1:], strict=False)
        return [(end - start) / 1e9 for start, end in pairs]


class CudaDevice(Device):
    """An NVIDIA GPU, where work is issued before it is done."""

    def __init__(self, name: str) -> None:
        if not torch.cuda.is_available():
            raise Unsupported(
                f"torch {torch.__version__} sees no CUDA GPU",
                "install a CUDA build of torch that the driver supports, or pass --device cpu",
            )
        self.torch = torch.device(name)
        torch.cuda.set_device(self.torch)
        # With cuDNN attention, torch's default on Hopper, each new length of the KV cache costs about 50 ms,
        # once per process; without it none does. See benchmarks/cudnn_attention.py.
        torch.backends.cuda.enable_cudnn_sdp(False)
        properties = torch.cuda.get_device_properties(self.torch)
        self.name = properties.name
        self.uuid = f"GPU-{properties.uuid}"

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch)

    def is_usable(self) -> bool:
        try:
            self.synchronize()
        except RuntimeError:
            return False
        return True

    def memory(self) -> TorchMemory:
        self.synchronize()
        stats = torch.cuda.memory_stats(self.torch)
        torch.cuda.reset_peak_memory_stats(self.torch)
        here = self.torch.index or 0
        segments = [each for each in torch.cuda.memory_snapshot() if each["device"] == here]
        return TorchMemory(
            requested_bytes=stats.get("requested_bytes.all.current", 0),
            allocated_bytes=stats.get("allocated_bytes.all.current", 0),
            active_bytes=stats.get("active_bytes.all.current", 0),
            inactive_split_bytes=stats.get("inactive_split_bytes.all.current", 0),
            reserved_bytes=stats.get("reserved_bytes.all.current", 0),
            peak_allocated_bytes=stats.get("allocated_bytes.all.peak", 0),
            peak_reserved_bytes=stats.get("reserved_bytes.all.peak", 0),
            private_pool_bytes=sum(
                segment["total_size"] for segment in segments if any(segment["segment_pool_id"])
            ),
            expandable_bytes=sum(segment["total_size"] for segment in segments if segment["is_expandable"]),
        )

    def initialize_cublas(self, dtype: torch.dtype) -> None:
        # A bias makes it use cuBLASLt as well. Whether their workspaces are inside torch's allocator depends
        # on the version of torch.
        ones = torch.ones(64, 64, dtype=dtype, device=self.torch)
        torch.nn.functional.linear(ones @ ones, ones, ones[0])

    def release_unused(self) -> None:
        # transformers reserves memory before loading, and quantizing leaves unquantized weights in the cache.
        gc.collect()
        torch.cuda.empty_cache()

    def step_times(self) -> StepTimes:
        return CudaEvents()

    def replayable(self, step: Callable[[], None], compiled: bool) -> Callable[[], None]:
        return record_graph(step, self.torch)


class CudaEvents:
    """CUDA events recorded between kernels: times by the GPU's own clock, read afterwards."""

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
    """The job's device. Raises `Unsupported` if torch can't use it."""
    return Device("cpu") if job.device == "cpu" else CudaDevice(job.device)
