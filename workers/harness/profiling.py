"""A pass under torch's profiler: which kernels ran, for how long, and how long the GPU was busy.

The profiler slows the host, so it gives no wall times. It doesn't change a kernel's time on the GPU, and the
union of all kernels' intervals is the GPU's busy time: compared with the unprofiled time of a step, it shows
how long the GPU was idle, waiting for the host.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from schemas.frames import Kernel, KernelTimes, Profile
from workers.generation.device import Device
from workers.generation.prompts import Batch
from workers.generation.timed_generation import Generate, Limits

DECODE_STEPS = 8
MAX_DECODE_S = 2.0
"""No step is started later than this: a step that takes seconds issues a million kernels."""
MAX_KERNELS = 20


def profile_generation(generate: Generate, batch: Batch, new_tokens: int, device: Device) -> Profile:
    """Kernel times of one prefill and of a few decode steps."""
    if device.torch.type != "cuda":
        return Profile(reason="kernels are only traced on NVIDIA GPUs")
    steps = min(DECODE_STEPS, new_tokens - 1)
    return Profile(
        prefill=_traced(lambda start: _prefill(generate, batch, start)),
        decode=_traced(lambda start: _decode(generate, batch, steps, start)) if steps else None,
    )


def _prefill(generate: Generate, batch: Batch, start: Callable[[], None]) -> int:
    start()
    generate(batch, Limits(1))
    return 1


def _decode(generate: Generate, batch: Batch, steps: int, start: Callable[[], None]) -> int:
    deadline_ns = time.monotonic_ns() + int(MAX_DECODE_S * 1e9)
    return len(generate(batch, Limits(1 + steps, deadline_ns), between=start).token_s)


def _traced(run: Callable[[Callable[[], None]], int]) -> KernelTimes:
    """Kernels from the time `run` calls its argument until it returns its number of steps, synchronized."""
    tracer = profile(activities=[ProfilerActivity.CUDA])
    steps = run(tracer.start)
    tracer.stop()
    events = (
        event
        for event in tracer.events() or []
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )
    return kernel_times(events, steps)


def kernel_times(events: Iterable[FunctionEvent], steps: int) -> KernelTimes:
    """Totals of GPU events, whose times are in microseconds."""
    spans = []
    by_name: defaultdict[str, list[float]] = defaultdict(list)
    for event in events:
        spans.append((event.time_range.start, event.time_range.end))
        by_name[event.name].append((event.time_range.end - event.time_range.start) / 1e6)
    kernels = [Kernel(name=name, count=len(s), total_s=sum(s)) for name, s in by_name.items()]
    longest = sorted(kernels, key=lambda kernel: -kernel.total_s)[:MAX_KERNELS]
    return KernelTimes(steps=steps, busy_s=union(spans) / 1e6, launches=len(spans), kernels=longest)


def union(spans: Iterable[tuple[float, float]]) -> float:
    """Total length covered by the spans."""
    covered, end_so_far = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, end_so_far))
        end_so_far = max(end_so_far, end)
    return covered
