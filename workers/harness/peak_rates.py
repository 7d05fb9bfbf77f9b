"""How fast a device moves and multiplies when nothing else is asked of it: the roofs of all that models do.

Bandwidth: a decode step at batch 1 multiplies a matrix of weights with a vector, and uses each weight once,
so it is the product of the two that is timed here, over a matrix far larger than any cache. A sum over the
same matrix reads as many bytes with less arithmetic. The faster of the two counts: what memory gave to
either, it can give, and a matrix–vector kernel that stays below it (BLAS on many a CPU does) is no roof.

Arithmetic: each of the n² elements of a product of two n × n matrices takes n multiplications and n
additions, 2n³ in all (its definition), on only 3n² numbers, so from some n on memory isn't the limit. The
second matrix lies transposed, as the weights of a linear layer do; 8-bit kernels insist on it.

Every figure is the best of repetitions, since whatever disturbs can only slow down. A repetition is of many
calls between two marks, so that the time to launch one vanishes; and repetitions go on for a while, since a
GPU that idled needs some ten milliseconds and more to raise its clocks.
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
"""What weights are multiplied in, the commonest first; float32 without TF32, as is torch's default."""

SIZES = {"cpu": (256, 512, 1024, 2048, 4096), "cuda": (2048, 4096, 8192)}
"""Side of the matrices by kind of device, in rising order: a device takes them as far as it can."""

GIB = 2**30
WEIGHT_BYTES = {"cpu": GIB // 2, "cuda": 2 * GIB}
FEWEST_BYTES = GIB // 4
"""Less than this might stay in a cache: an H100's holds 50 MB, an RTX 5090's 96."""
COLUMNS = 8192

BOX_S = 0.25
"""Time for repetitions, of each bandwidth and of each dtype."""
REPETITION_S = 0.02
LATEST_START_S = 4.0
"""No dtype is begun later than this, so that a slow device keeps nobody waiting."""


def measure_peaks(device: Device) -> Peaks:
    """Everything, in under 5 seconds. Raises `Unsupported` where there is too little memory to tell."""
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
    """Bytes per second read, and bytes per second copied, where each byte is read and written: two."""
    weights = _weights(device)
    vector = torch.randn(1, COLUMNS, device=weights.device, dtype=weights.dtype)
    reads = [partial(functional.linear, vector, weights), weights.sum]
    read_s = min(_best_s(read, device, BOX_S) for read in reads)
    source, target = weights.chunk(2)
    copy_s = _best_s(partial(target.copy_, source), device, BOX_S)
    return weights.nbytes / read_s, (source.nbytes + target.nbytes) / copy_s


def _weights(device: Device) -> torch.Tensor:
    """A matrix far larger than the caches, of at most a quarter of the GPU memory that is free."""
    kind = device.torch.type
    room_bytes = WEIGHT_BYTES[kind]
    if kind == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device.torch)
        room_bytes = min(room_bytes, free_bytes // 4)
        if room_bytes < FEWEST_BYTES:
            raise Unsupported(
                f"{free_bytes / GIB:.1f} GiB of GPU memory are free, too little to read past its cache",
                "end what else runs on the GPU",
            )
    dtype = torch.float16 if kind == "cuda" else torch.float32
    # One random row again and again: memory doesn't care, and a CPU would take a second to draw them all.
    row = torch.randn(COLUMNS, device=device.torch, dtype=dtype)
    return row.repeat(room_bytes // row.nbytes // 2 * 2, 1)


def matrix_rates(device: Device, latest_start_s: float) -> tuple[dict[str, float], dict[str, str]]:
    """Torch dtype → operations per second; and torch dtype → why there is no rate of it."""
    rates: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name in DTYPES:
        if time.monotonic() > latest_start_s:
            missing[name] = "the time for measuring peaks was spent on the others"
            continue
        try:
            rates[name] = _matrix_rate(getattr(torch, name), device)
        except Exception as error:
            missing[name] = describe_failure(error).message
        device.release_unused()
    return rates, missing


def _matrix_rate(dtype: torch.dtype, device: Device) -> float:
    """The best over all sizes that fit into memory and into the time."""
    sizes = SIZES[device.torch.type]
    box_s = BOX_S / len(sizes)
    best = 0.0
    for size in sizes:
        try:
            product_s = _best_s(_product(dtype, size, device), device, box_s)
        except torch.OutOfMemoryError:  # on a GPU that others use too
            if not best:
                raise
            break
        best = max(best, 2 * size**3 / product_s)
        if 2**3 * product_s > box_s:  # what a matrix of twice the side would take
            break
    return best


def _product(dtype: torch.dtype, size: int, device: Device) -> Callable[[], torch.Tensor]:
    left, right = _random(dtype, size, device), _random(dtype, size, device).t()
    if dtype == torch.int8:
        return partial(torch._int_mm, left, right)
    if dtype == torch.float8_e4m3fn:
        one = torch.ones((), device=device.torch)
        # Fast accumulation is what inference asks for; the exact one promotes partial sums and costs speed.
        scaled = partial(torch._scaled_mm, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        return partial(scaled, left, right, use_fast_accum=True)
    return partial(torch.matmul, left, right)


def _random(dtype: torch.dtype, size: int, device: Device) -> torch.Tensor:
    # Of normal values, as weights are: with zeros no bit toggles, the chip draws less power, and clocks
    # that a power limit would hold down are flattered.
    values = torch.randn(size, size, device=device.torch)
    if dtype == torch.int8:
        values.mul_(32).clamp_(-127, 127)
    return values.to(dtype)


def _best_s(work: Callable[[], object], device: Device, box_s: float) -> float:
    """Seconds that one call takes: the mean of the best repetition in `box_s`."""
    work()  # the first call loads kernels, and chooses among them
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
