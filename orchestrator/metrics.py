"""Figures from records: pure functions, so that a mended metric never needs a rerun.

Definitions, as the field uses them:

- TTFT, time to first token: the wall span of prefill, prompt in to first token chosen; the median over
  trials.
- decode tok/s: tokens made by decode steps over their wall spans, summed over trials and rows. The first
  token of each row belongs to prefill and is in neither sum.
- end-to-end tok/s: all new tokens over prefill and decode together. This is what the seed benchmark
  called tok/s.
"""

from collections.abc import Iterable
from statistics import median

import msgspec

from orchestrator.memory import summarize_memory
from schemas.frames import Done, Failed, Trial
from schemas.record import CellRecord, Skipped

BASELINE = "fp16"


class CellMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the table, unformatted. What could not be measured is None and `reason` says why."""

    precision: str
    label: str
    bits_per_weight: float
    reason: str | None = None
    trials: int = 0
    ttft_s: float | None = None
    prefill_tok_s: float | None = None
    decode_tok_s: float | None = None
    end_to_end_tok_s: float | None = None
    decode_versus_baseline: float | None = None
    """This decode tok/s over FP16's; above 1 is faster."""
    end_to_end_versus_baseline: float | None = None
    """The seed benchmark's speed-up."""
    weight_bytes: int | None = None
    """Parameters, buffers and quantization scales, read off the modules."""
    loaded_bytes: int | None = None
    """`memory_allocated()` after load: the model's footprint. On a CPU the resident set then."""
    peak_bytes: int | None = None
    """Highest `max_memory_allocated()` from warm-up to end. On a CPU the resident set's peak."""
    nvml_peak_bytes: int | None = None
    """Highest NVML process bytes at a phase edge; None on a CPU, or where a container hides pids."""
    footprint_bytes: int | None = None
    """What savings are reckoned in: `loaded_bytes` on a GPU. On a CPU `weight_bytes`, since a resident
    set is mostly Python and torch."""
    saved_versus_baseline: float | None = None
    """1 − footprint over FP16's."""


def summarize(cells: list[CellRecord]) -> list[CellMetrics]:
    """One row per cell, with ratios to the FP16 cell where the run has one."""
    rows = [measure_cell(cell) for cell in cells]
    baseline = next((row for row in rows if row.precision == BASELINE), None)
    return rows if baseline is None else [_compare(row, baseline) for row in rows]


def measure_cell(cell: CellRecord) -> CellMetrics:
    """The figures of one cell by itself."""
    row = CellMetrics(precision=cell.precision, label=cell.label, bits_per_weight=cell.bits_per_weight)
    if not isinstance(cell.outcome, Done):
        return msgspec.structs.replace(row, reason=reason(cell.outcome))
    trials = cell.trials
    decode_tokens = sum(len(trial.token_s) * trial.batch_size for trial in trials)
    decode_s = sum(trial.decode_s for trial in trials)
    weight_bytes = sum(cell.loaded.weight_bytes.values()) if cell.loaded else None
    memory = summarize_memory(cell)
    return msgspec.structs.replace(
        row,
        trials=len(trials),
        ttft_s=median(trial.prefill_s for trial in trials),
        prefill_tok_s=_rate(
            sum(trial.prompt_tokens * trial.batch_size for trial in trials),
            sum(trial.prefill_s for trial in trials),
        ),
        decode_tok_s=_rate(decode_tokens, decode_s),
        end_to_end_tok_s=end_to_end_tok_s(trials),
        weight_bytes=weight_bytes,
        loaded_bytes=memory.loaded_bytes,
        peak_bytes=memory.peak_bytes,
        nvml_peak_bytes=memory.nvml_peak_bytes,
        footprint_bytes=memory.loaded_bytes if memory.on_gpu else weight_bytes,
    )


def end_to_end_tok_s(trials: Iterable[Trial]) -> float | None:
    """New tokens per second of prefill and decode together."""
    trials = list(trials)
    tokens = sum(trial.new_tokens * trial.batch_size for trial in trials)
    return _rate(tokens, sum(trial.prefill_s + trial.decode_s for trial in trials))


def reason(outcome: Failed | Skipped) -> str:
    """Why a cell has no figures, in one line."""
    if isinstance(outcome, Skipped):
        return f"left out: {outcome.reason}"
    hint = f" ({outcome.hint})" if outcome.hint else ""
    return f"{outcome.kind}: {outcome.message}{hint}"


def _compare(row: CellMetrics, baseline: CellMetrics) -> CellMetrics:
    saved = _ratio(row.footprint_bytes, baseline.footprint_bytes)
    return msgspec.structs.replace(
        row,
        decode_versus_baseline=_ratio(row.decode_tok_s, baseline.decode_tok_s),
        end_to_end_versus_baseline=_ratio(row.end_to_end_tok_s, baseline.end_to_end_tok_s),
        saved_versus_baseline=None if saved is None else 1 - saved,
    )


def _ratio(value: float | None, baseline: float | None) -> float | None:
    return None if value is None or not baseline else value / baseline


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count and seconds else None
