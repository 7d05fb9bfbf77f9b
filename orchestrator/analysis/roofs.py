"""How close a cell came to the hardware's roofs: the bytes and arithmetic that it needs, over its time.

A decode step multiplies every weight with one vector per sequence, so it must read all weights, and all
keys and values of the context, for little arithmetic on each: memory bandwidth is its roof. Prefill
multiplies the same weights with the whole prompt, so from a few hundred tokens its roof is arithmetic. The
share of the roof that was reached is called MBU for bytes and MFU for arithmetic.

Bytes and arithmetic are those that the model requires, not those that a kernel spends: unpacking weights into
a copy, or reading a static cache to its end, moves more bytes but doesn't raise MBU.

Sources: 2 × parameters FLOPs per token, Kaplan et al. 2020 (arXiv:2001.08361, §2.1); MFU and the
arithmetic of attention, Chowdhery et al. 2022, PaLM (arXiv:2204.02311, appendix B), less the half that the
causal mask removes; MBU, Databricks, "LLM Inference Performance Engineering: Best Practices"
(2023).

Padding counts as context and as prompt, since the GPU processes it too.
"""

from schemas.frames import ForwardCosts, Trial
from schemas.record import CellRecord


def decode_steps(cell: CellRecord) -> int:
    """Decode steps measured, over all trials."""
    return sum(len(trial.token_s) for trial in cell.trials)


def seconds_per_step(cell: CellRecord) -> float | None:
    """Mean wall time of a decode step, in seconds, without a profiler."""
    return _quotient(sum(trial.decode_s for trial in cell.trials), decode_steps(cell))


def decode_step_bytes(cell: CellRecord) -> float | None:
    """Bytes that an average decode step must read: weights once, the context once for each sequence.

    The average is over all steps of all trials. The first step of a trial takes the token from prefill and
    attends to depth + prompt + 1 positions: the one that it writes counts, since attention reads it back.
    """
    costs, steps = _costs(cell), decode_steps(cell)
    if costs is None or not steps:
        return None
    positions = sum(trial.batch_size * _decode_context(cell, trial) for trial in cell.trials)
    return costs.step_weight_bytes + costs.kv_bytes_per_token * positions / steps


def prefill_bytes(cell: CellRecord, trial: Trial) -> float | None:
    """Bytes that the prefill of a trial must move: weights and earlier context read, new context written."""
    costs = _costs(cell)
    if costs is None:
        return None
    positions = trial.batch_size * (_depth(cell) + trial.prompt_tokens)
    return float(costs.step_weight_bytes + costs.kv_bytes_per_token * positions)


def decode_flop(cell: CellRecord, trial: Trial) -> float | None:
    """Multiplications and additions of all decode steps of a trial, over all its sequences."""
    costs, steps = _costs(cell), len(trial.token_s)
    if costs is None:
        return None
    weights = 2 * (costs.linear_parameters + costs.head_parameters) * steps
    return float(trial.batch_size * (weights + _attention_flop(costs, _decode_context(cell, trial))))


def prefill_flop(cell: CellRecord, trial: Trial) -> float | None:
    """Multiplications and additions of the prefill of a trial, over all its sequences.

    Token i of the prompt attends to depth + i positions, i from 1. Only the last position of a sequence
    gets logits, so the output head runs once.
    """
    costs = _costs(cell)
    if costs is None:
        return None
    weights = 2 * costs.linear_parameters * trial.prompt_tokens + 2 * costs.head_parameters
    context = _summed_context(_depth(cell), trial.prompt_tokens)
    return float(trial.batch_size * (weights + _attention_flop(costs, context)))


def decode_mbu(cell: CellRecord, bandwidth_bytes_per_s: float | None) -> float | None:
    """Model bandwidth utilization of decode: bytes per step ÷ time per step ÷ measured read bandwidth."""
    return _share(decode_step_bytes(cell), seconds_per_step(cell), bandwidth_bytes_per_s)


def decode_mfu(cell: CellRecord, matrix_flop_per_s: float | None) -> float | None:
    """Model FLOPs utilization of decode, relative to the measured matrix rate of the compute dtype."""
    flop = _total([decode_flop(cell, trial) for trial in cell.trials])
    return _share(flop, sum(trial.decode_s for trial in cell.trials), matrix_flop_per_s)


def prefill_mbu(cell: CellRecord, bandwidth_bytes_per_s: float | None) -> float | None:
    """Model bandwidth utilization of prefill, over all trials."""
    moved = _total([prefill_bytes(cell, trial) for trial in cell.trials])
    return _share(moved, sum(trial.prefill_s for trial in cell.trials), bandwidth_bytes_per_s)


def prefill_mfu(cell: CellRecord, matrix_flop_per_s: float | None) -> float | None:
    """Model FLOPs utilization of prefill, over all trials, relative to the compute dtype's measured rate."""
    flop = _total([prefill_flop(cell, trial) for trial in cell.trials])
    return _share(flop, sum(trial.prefill_s for trial in cell.trials), matrix_flop_per_s)


def roof_tok_s(cell: CellRecord, bandwidth_bytes_per_s: float | None) -> float | None:
    """Decode tokens per second at an MBU of 1: the limit for any kernel for this format."""
    step_bytes, steps = decode_step_bytes(cell), decode_steps(cell)
    if not step_bytes or bandwidth_bytes_per_s is None:
        return None
    tokens = sum(len(trial.token_s) * trial.batch_size for trial in cell.trials)
    return tokens / steps * bandwidth_bytes_per_s / step_bytes


def _costs(cell: CellRecord) -> ForwardCosts | None:
    return None if cell.loaded is None else cell.loaded.costs


def _depth(cell: CellRecord) -> int:
    return 0 if cell.job is None else cell.job.workload.depth


def _decode_context(cell: CellRecord, trial: Trial) -> int:
    """Positions attended to in the decode steps of one sequence, summed over the steps."""
    return _summed_context(_depth(cell) + trial.prompt_tokens, len(trial.token_s))


def _summed_context(before: int, tokens: int) -> int:
    """Token i of `tokens`, from 1, attends to `before` + i positions: their sum."""
    return before * tokens + tokens * (tokens + 1) // 2


def _attention_flop(costs: ForwardCosts, positions: int) -> int:
    """Query times key, and weight times value: a multiplication and an addition each."""
    return 4 * costs.attention_width * positions


def _total(values: list[float | None]) -> float | None:
    """Sum over the trials of one cell, whose costs are known for all trials or for none."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _share(amount: float | None, seconds: float | None, peak_per_s: float | None) -> float | None:
    """The share of a peak that was reached; None if the amount, the time or the peak is unknown or 0."""
    rate = _quotient(amount, seconds)
    return _quotient(rate, peak_per_s)


def _quotient(value: float | None, divisor: float | None) -> float | None:
    return value / divisor if value and divisor else None
