"""Warm-up: untimed trials that keep lazy initialization, autotuning and rising clocks out of every figure."""

import time

from schemas.frames import WarmedUp
from schemas.job import Workload
from workers.generation.prompts import Batch
from workers.generation.timed_generation import Generate, Limits
from workers.protocol.backend import Report

BUDGET_SHARE = 0.25
"""Fraction of a budget that warm-up may use."""
MAX_EXTRA_TRIALS = 4
"""Untimed trials added to those requested while the last two don't agree."""
EXTRA_TRIALS_S = 5.0
"""After this long no trials are added: a host whose speed drifts never settles."""
AGREEMENT = 0.02
"""Largest relative difference between two trials that agree."""


def run_other_shapes(generate: Generate, batches: list[Batch]) -> None:
    """Generate two tokens from each prompt shape other than the first batch's, which warm-up runs next.

    Triton compiles and tunes its kernels per number of rows, which takes seconds in the first prefill.
    """
    shapes = {batch.ids.shape: batch for batch in batches}
    del shapes[batches[0].ids.shape]
    for batch in shapes.values():
        generate(batch, Limits(2))


def warm_up(
    generate: Generate, batch: Batch, workload: Workload, report: Report, deadline_ns: int | None
) -> WarmedUp:
    """Run untimed trials of `batch` until two in a row agree, within the workload's and budget's limits."""
    start_ns = time.monotonic_ns()
    if deadline_ns is not None:
        deadline_ns = start_ns + int(BUDGET_SHARE * max(deadline_ns - start_ns, 0))
    limits = Limits(workload.new_tokens, deadline_ns)
    last_start_ns = start_ns + int(EXTRA_TRIALS_S * 1e9)
    last_start_ns = last_start_ns if deadline_ns is None else min(last_start_ns, deadline_ns)
    most = workload.warmup + MAX_EXTRA_TRIALS if workload.warmup else 0
    trial_s: list[float] = []
    for index in range(most):
        if index >= workload.warmup and (settled(trial_s) or time.monotonic_ns() > last_start_ns):
            break
        report("warm-up", index, most)
        generation = generate(batch, limits)
        trial_s.append(generation.prefill_s + generation.decode_s)
    return WarmedUp(trial_s=trial_s, settled=settled(trial_s))


def settled(trial_s: list[float]) -> bool | None:
    """Whether the last two of these times agree; None if there are fewer than two."""
    if len(trial_s) < 2:
        return None
    before, last = trial_s[-2:]
    return abs(last - before) <= AGREEMENT * before
