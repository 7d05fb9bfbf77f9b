"""A pass under torch's profiler: which kernels ran, for how long, and how long the GPU worked at all.

The profiler slows the host, so no wall time is taken from it. What a kernel takes on the GPU is not
changed, and the union of all kernels' intervals is the time in which the GPU worked: set against the
unprofiled time of a step it tells how long it stood idle, waiting for the host.
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
from workers.generation.timing import Generate, Limits

DECODE_STEPS = 8
ENOUGH_S = 2.0
"""No further step is begun after so long: where a step takes seconds, it issues a million kernels."""
KEPT_KERNELS = 20


def profile_generation(generate: Generate, batch: Batch, new_tokens: int, device: Device) -> Profile:
    """Kernel times of one prefill and of a few decode steps."""
    if device.torch.type != "cuda":
        return Profile(reason="kernels are traced on NVIDIA GPUs alone")
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
    enough_ns = time.monotonic_ns() + int(ENOUGH_S * 1e9)
    return len(generate(batch, Limits(1 + steps, enough_ns), between=start).token_s)


def _traced(run: Callable[[Callable[[], None]], int]) -> KernelTimes:
    """What the GPU ran from where `run` calls its argument until it returned, synchronised, how many steps
    it made."""
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
    """Sum up GPU events, whose times are in microseconds."""
    spans = []
    by_name: defaultdict[str, list[float]] = defaultdict(list)
    for event in events:
        spans.append((event.time_range.start, event.time_range.end))
        by_name[event.name].append((event.time_range.end - event.time_range.start) / 1e6)
    kernels = [Kernel(name=name, count=len(s), total_s=sum(s)) for name, s in by_name.items()]
    longest = sorted(kernels, key=lambda kernel: -kernel.total_s)[:KEPT_KERNELS]
    return KernelTimes(steps=steps, busy_s=union(spans) / 1e6, launches=len(spans), kernels=longest)


def union(spans: Iterable[tuple[float, float]]) -> float:
    """Length of what the spans cover together."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
