"""What limited a cell's speed: the host, the memory, the arithmetic, or the kernels themselves.

There are four possible limits, with different remedies:

- launch: the host can't launch kernels as fast as the GPU runs them, so the GPU idles. Speed then measures
  Python, and a CUDA graph is the remedy.
- bandwidth, compute: the GPU is busy and near one of its roofs. The remedy is fewer bytes or less arithmetic,
  so this is the one case in which a smaller format must be faster.
- kernel: the GPU is busy, but far from both roofs. The remedy is another kernel for the same format.

GPU-busy time comes from kernel times under a profiler. The profiler slows the host but hardly the kernels, so
they are compared with the wall times of trials that ran without it.
"""

from typing import Literal

import msgspec

from orchestrator.analysis.roofs import decode_mbu, decode_mfu, prefill_mbu, prefill_mfu, seconds_per_step
from schemas.frames import KernelTimes
from schemas.record import CellRecord

Bound = Literal["launch", "bandwidth", "compute", "kernel"]

BUSY_SHARE = 0.75
"""Below this share of a step, the GPU counts as waiting for the host. On an H100, replayed CUDA graphs kept
it busy throughout, and eager decode of the same models for 6% to 22% of the time (results/h100-modes,
results/h100-precisions-7b). The threshold is between the two, nearer to the graphs, since a GPU that idles
for a quarter of the time is not limited by its own speed."""

NEAR_ROOF = 0.5
"""From this share of a measured peak, the roof is the bound: another kernel could then gain a factor of two
at most. Decode of a 7B model in FP16 reaches 60% on an H100 with torch's own kernels, 84% compiled."""


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """What limited the decode steps of a cell, or its prefills, and the figures behind that.

    A step is one decode step, which generates a token for every sequence of the batch, or one prefill.
    """

    bound: Bound | None = None
    """None if undecidable: without kernel times, or if the GPU was busy but a roof is unknown."""
    busy_share: float | None = None
    """GPU-busy time per step over wall time per step without the profiler, at most 1."""
    busy_s_per_step: float | None = None
    launches_per_step: float | None = None
    """Kernels and copies per step; at batch 1, kernels per token."""
    mbu: float | None = None
    mfu: float | None = None
    enqueue_share: float | None = None
    """Host time spent launching decode steps, over their wall time. Alone, a value near 1 proves nothing: a
    host that is ahead blocks once the driver's launch queue is full. None for prefill."""


def decode_pace(
    cell: CellRecord, bandwidth_bytes_per_s: float | None, matrix_flop_per_s: float | None
) -> Pace:
    """What limited decode, given the peaks measured on the device; None for an unknown peak."""
    decode_s = sum(trial.decode_s for trial in cell.trials)
    enqueue_s = sum(trial.enqueue_s for trial in cell.trials)
    pace = _pace(
        cell.profile.decode if cell.profile else None,
        seconds_per_step(cell),
        decode_mbu(cell, bandwidth_bytes_per_s),
        decode_mfu(cell, matrix_flop_per_s),
    )
    return msgspec.structs.replace(pace, enqueue_share=enqueue_s / decode_s if decode_s else None)


def prefill_pace(
    cell: CellRecord, bandwidth_bytes_per_s: float | None, matrix_flop_per_s: float | None
) -> Pace:
    """The same for prefill. With prompts of different lengths the busy share is approximate."""
    prefill_s = sum(trial.prefill_s for trial in cell.trials)
    return _pace(
        cell.profile.prefill if cell.profile else None,
        prefill_s / len(cell.trials) if cell.trials else None,
        prefill_mbu(cell, bandwidth_bytes_per_s),
        prefill_mfu(cell, matrix_flop_per_s),
    )


def _pace(kernels: KernelTimes | None, step_s: float | None, mbu: float | None, mfu: float | None) -> Pace:
    if kernels is None or not kernels.steps or not kernels.busy_s or not step_s:
        return Pace(mbu=mbu, mfu=mfu)
    busy_s = kernels.busy_s / kernels.steps
    busy_share = min(busy_s / step_s, 1.0)
    return Pace(
        bound=_bound(busy_share, mbu, mfu),
        busy_share=busy_share,
        busy_s_per_step=busy_s,
        launches_per_step=kernels.launches / kernels.steps,
        mbu=mbu,
        mfu=mfu,
    )


def _bound(busy_share: float, mbu: float | None, mfu: float | None) -> Bound | None:
    if busy_share < BUSY_SHARE:
        return "launch"
    if max(mbu or 0.0, mfu or 0.0) >= NEAR_ROOF:
        return "bandwidth" if (mbu or 0.0) >= (mfu or 0.0) else "compute"
    # Whether both roofs are far is only known if both roofs are.
    return None if mbu is None or mfu is None else "kernel"
