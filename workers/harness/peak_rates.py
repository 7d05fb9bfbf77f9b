"""Peak memory bandwidth and arithmetic throughput of a device: the roofline for everything a model does.

Bandwidth: a decode step at batch 1 multiplies a weight matrix by a vector and uses each weight once, so that
product is timed here, on a matrix far larger than any cache. A sum over the same matrix reads as many bytes
with less arithmetic. The faster of the two counts: memory has then delivered that much, and a matrix-vector
kernel that stays below it (as BLAS does on many CPUs) is not the limit.

Arithmetic: each of the n² elements of a product of two n × n matrices takes n multiplications and n
additions, 2n³ in all (by definition), on only 3n² numbers, so for large n memory isn't the limit. The second
matrix is stored transposed, like the weights of a linear layer; 8-bit kernels require it.

Every figure is the best of several repetitions, because disturbances only slow things down. A repetition is
many calls between two marks, so that launch time becomes negligible; and repetitions continue for a while,
because an idle GPU needs ten milliseconds or more to raise its clocks.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

from schemas.frames import Peaks
from workers.generation.device import Device
from workers.protocol.errors import Unsupported, describe_failure

DTYPES = ("float16", "bfloat16", "float32", "int8", "float8_e4m3fn")
"""Dtypes that weights are multiplied in, most common first; float32 without TF32, torch's default."""

SIZES = {"cpu": (256, 512, 1024, 2048, 4096), "cuda": (2048, 4096, 8192)}
"""Sizes n of the matrices, ascending; a slow device stops early."""

GIB = 2**30
WEIGHT_BYTES = {"cpu": GIB // 2, "cuda": 2 * GIB}
MIN_BYTES = GIB // 4
"""Anything smaller might fit in a cache: an H100's holds 50 MB, an RTX 5090's 96."""
COLUMNS = 8192

TIME_BOX_S = 0.25
"""Time for the repetitions of each bandwidth and of each dtype."""
REPETITION_S = 0.02
LATEST_START_S = 4.0
"""No dtype is started later than this, so that a slow device doesn't keep users waiting."""


def measure_peaks(device: Device) -> Peaks:
    """All peaks, in under 5 seconds. Raises `Unsupported` if there is too little free memory."""
    began_s = time.monotonic()
    read_bytes_per_s, copy_bytes_per_s = bandwidths(device)
    device.release_unused()
    rates, missing = matrix_rates(device, began_s + LATEST_START_S)
    return Peaks(
        read_bytes_per_s=read_bytes_per_s,
        copy_bytes_per_s=copy_bytes_per_s,
        matrix_flop_per_s=rates,
        missing=missing,
        measured_s=time.monotonic() - began_s,
    )


def bandwidths(device: Device) -> tuple[float, float]:
    """Bytes per second read, and bytes per second copied; a copied byte counts twice, read and written."""
    weights = _weights(device)
    vector = torch.randn(1, COLUMNS, device=weights.device, dtype=weights.dtype)
    reads = [partial(functional.linear, vector, weights), weights.sum]
    read_s = min(_best_s(read, device, TIME_BOX_S) for read in reads)
    source, target = weights.chunk(2)
    copy_s = _best_s(partial(target.copy_, source), device, TIME_BOX_S)
    return weights.nbytes / read_s, (source.nbytes + target.nbytes) / copy_s


def _weights(device: Device) -> torch.Tensor:
    """A matrix far larger than the caches, using at most a quarter of the free GPU memory."""
    kind = device.torch.type
    size_bytes = WEIGHT_BYTES[kind]
    if kind == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device.torch)
        size_bytes = min(size_bytes, free_bytes // 4)
        if size_bytes < MIN_BYTES:
            raise Unsupported(
                f"{free_bytes / GIB:.1f} GiB of GPU memory are free, too little to exceed its cache",
                "stop other programs on the GPU",
            )
    dtype = torch.float16 if kind == "cuda" else torch.float32
    # One random row, repeated: values don't matter here, and a CPU would need a second to draw them all.
    row = torch.randn(COLUMNS, device=device.torch, dtype=dtype)
    return row.repeat(size_bytes // row.nbytes // 2 * 2, 1)


def matrix_rates(device: Device, latest_start_s: float) -> tuple[dict[str, float], dict[str, str]]:
    """Operations per second by torch dtype; and by torch dtype, why there is none."""
    rates: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name in DTYPES:
        if time.monotonic() > latest_start_s:
            missing[name] = "not measured: the time limit was used up by other dtypes"
            continue
        try:
            rates[name] = _matrix_rate(getattr(torch, name), device)
        except Exception as error:
            missing[name] = describe_failure(error).message
        device.release_unused()
    return rates, missing


def _matrix_rate(dtype: torch.dtype, device: Device) -> float:
    """The best over all sizes that fit in memory and in the time box."""
    sizes = SIZES[device.torch.type]
    box_s = TIME_BOX_S / len(sizes)
    best = 0.0
    for size in sizes:
        try:
            product_s = _best_s(_product(dtype, size, device), device, box_s)
        except torch.OutOfMemoryError:  # on a shared GPU
            if not best:
                raise
            break
        best = max(best, 2 * size**3 / product_s)
        if 2**3 * product_s > box_s:  # time of a matrix twice the size
            break
    return best


def _product(dtype: torch.dtype, size: int, device: Device) -> Callable[[], torch.Tensor]:
    left, right = _random(dtype, size, device), _random(dtype, size, device).t()
    if dtype == torch.int8:
        return partial(torch._int_mm, left, right)
    if dtype == torch.float8_e4m3fn:
        one = torch.ones((), device=device.torch)
        # Inference uses fast accumulation; the exact one promotes partial sums, which costs speed.
        scaled = partial(torch._scaled_mm, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        return partial(scaled, left, right, use_fast_accum=True)
    return partial(torch.matmul, left, right)


def _random(dtype: torch.dtype, size: int, device: Device) -> torch.Tensor:
    # Normally distributed like weights: zeros toggle no bits, so the chip would draw less power and keep
    # clocks that a power limit would otherwise lower.
    values = torch.randn(size, size, device=device.torch)
    if dtype == torch.int8:
        values.mul_(32).clamp_(-127, 127)
    return values.to(dtype)


def _best_s(work: Callable[[], object], device: Device, box_s: float) -> float:
    """Seconds per call: the mean of the best repetition within `box_s`."""
    work()  # the first call loads and selects kernels
    began_s = time.monotonic()
    best_s = _mean_s(work, 1, device)
    calls = max(1, round(REPETITION_S / best_s))
    while time.monotonic() < began_s + box_s:
        best_s = min(best_s, _mean_s(work, calls, device))
    return best_s


def _mean_s(work: Callable[[], object], calls: int, device: Device) -> float:
    times = device.step_times()
    times.mark()
    for _ in range(calls):
        work()
    times.mark()
    device.synchronize()
    (span_s,) = times.intervals_s()
    return span_s / calls
