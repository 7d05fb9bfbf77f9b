"""Figures from records: pure functions, so that a mended metric never needs a rerun.

Definitions, as the field uses them:

- TTFT, time to first token: the wall span of prefill, prompt in to first token chosen; the median over
  trials.
- decode tok/s: tokens made by decode steps over their wall spans, summed over trials and rows. The first
  token of each row belongs to prefill and is in neither sum.
- MBU and MFU: `orchestrator.analysis.roofs`. Bound: `orchestrator.analysis.bounds`.
- end-to-end tok/s: all new tokens over prefill and decode together. This is what the seed benchmark
  called tok/s.
- Agreement with FP16: `orchestrator.analysis.agreement`.
"""

from collections.abc import Iterable
from statistics import median

import msgspec

from orchestrator.analysis.agreement import agreements, mean_agreement
from orchestrator.analysis.baselines import baseline_of, find_baselines
from orchestrator.analysis.bounds import Bound, decode_pace, prefill_pace
from orchestrator.analysis.intervals import Verdict
from orchestrator.analysis.memory.phases import summarize_memory
from orchestrator.analysis.peaks import bandwidth_bytes_per_s, matrix_flop_per_s
from orchestrator.analysis.roofs import roof_tok_s
from orchestrator.records.keys import WorkloadKey
from schemas.frames import Done, Failed, Trial
from schemas.job import DecodeMode
from schemas.record import CellRecord, PeaksRecord, Skipped


class CellMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the table, unformatted. What could not be measured is None and `reason` says why."""

    precision: str
    label: str
    bits_per_weight: float
    decode: DecodeMode = "eager"
    prompt_tokens: int | None = None
    """What every prompt was cut or repeated to; None where each kept its own length."""
    depth: int = 0
    batch_size: int = 1
    new_tokens: int | None = None
    """Those asked for per prompt; None of what was left out before there was a job."""
    reason: str | None = None
    warmup_trials: int | None = None
    trials: int = 0
    setup_s: float | None = None
    """Shapes, capture and compilation, in no other figure."""
    compile_s: float | None = None
    ttft_s: float | None = None
    prefill_tok_s: float | None = None
    decode_tok_s: float | None = None
    end_to_end_tok_s: float | None = None
    decode_versus_baseline: float | None = None
    """This decode tok/s over FP16's in the same decode mode on the same workload; above 1 is faster. Of
    several rounds the geometric mean."""
    decode_versus_low: float | None = None
    """Lower end of its 95 % interval over rounds; None of one round."""
    decode_versus_high: float | None = None
    rounds: int = 1
    """Those that the ratio rests on."""
    verdict: Verdict | None = None
    decode_roof_tok_s: float | None = None
    """Decode tok/s if nothing but the measured memory bandwidth held it back."""
    decode_mbu: float | None = None
    decode_bound: Bound | None = None
    decode_busy_share: float | None = None
    """Part of a decode step in which the GPU worked."""
    decode_busy_s: float | None = None
    """Time in which the GPU worked, per decode step."""
    kernels_per_token: float | None = None
    """Kernels and copies launched per decode step."""
    prefill_mfu: float | None = None
    prefill_bound: Bound | None = None
    prefill_busy_share: float | None = None
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
    agreement_with_baseline: float | None = None
    """Share of tokens before the first that FP16 chose otherwise; None of random weights."""

    @property
    def workload(self) -> WorkloadKey:
        return WorkloadKey(self.prompt_tokens, self.depth, self.batch_size, self.new_tokens or 0)


def summarize(cells: list[CellRecord], peaks: PeaksRecord | None = None) -> list[CellMetrics]:
    """One row per cell, held against the device's peaks and against its FP16 cell where there is one."""
    rows = {id(cell): measure_cell(cell, peaks) for cell in cells}
    baselines = find_baselines(cells)
    pairs = [(cell, baseline_of(cell, baselines)) for cell in cells]
    return [
        rows[id(cell)]
        if baseline is None
        else _compare(rows[id(cell)], rows[id(baseline)], _agreement(cell, baseline))
        for cell, baseline in pairs
    ]


def measure_cell(cell: CellRecord, peaks: PeaksRecord | None = None) -> CellMetrics:
    """The figures of one cell by itself."""
    row = _identity(cell)
    if not isinstance(cell.outcome, Done):
        return msgspec.structs.replace(row, reason=reason(cell.outcome))
    trials = cell.trials
    weight_bytes = sum(cell.loaded.weight_bytes.values()) if cell.loaded else None
    memory = summarize_memory(cell)
    bandwidth = bandwidth_bytes_per_s(peaks)
    flop_per_s = matrix_flop_per_s(peaks, cell.loaded.compute_dtype) if cell.loaded else None
    decode = decode_pace(cell, bandwidth, flop_per_s)
    prefill = prefill_pace(cell, bandwidth, flop_per_s)
    return msgspec.structs.replace(
        row,
        warmup_trials=len(cell.warmed_up.trial_s) if cell.warmed_up else None,
        trials=len(trials),
        setup_s=cell.setup.setup_s if cell.setup else None,
        compile_s=cell.setup.compile_s if cell.setup else None,
        ttft_s=median(trial.prefill_s for trial in trials),
        prefill_tok_s=_rate(
            sum(trial.prompt_tokens * trial.batch_size for trial in trials),
            sum(trial.prefill_s for trial in trials),
        ),
        decode_tok_s=decode_tok_s(cell),
        end_to_end_tok_s=end_to_end_tok_s(trials),
        decode_roof_tok_s=roof_tok_s(cell, bandwidth),
        decode_mbu=decode.mbu,
        decode_bound=decode.bound,
        decode_busy_share=decode.busy_share,
        decode_busy_s=decode.busy_s_per_step,
        kernels_per_token=decode.launches_per_step,
        prefill_mfu=prefill.mfu,
        prefill_bound=prefill.bound,
        prefill_busy_share=prefill.busy_share,
        weight_bytes=weight_bytes,
        loaded_bytes=memory.loaded_bytes,
        peak_bytes=memory.peak_bytes,
        nvml_peak_bytes=memory.nvml_peak_bytes,
        footprint_bytes=memory.loaded_bytes if memory.on_gpu else weight_bytes,
    )


def _identity(cell: CellRecord) -> CellMetrics:
    row = CellMetrics(precision=cell.precision, label=cell.label, bits_per_weight=cell.bits_per_weight)
    if cell.job is None:
        return row
    load = cell.job.workload
    return msgspec.structs.replace(
        row,
        decode=load.decode,
        prompt_tokens=load.prompt_tokens,
        depth=load.depth,
        batch_size=load.batch_size,
        new_tokens=load.new_tokens,
    )


def decode_tok_s(cell: CellRecord) -> float | None:
    """Tokens of decode steps per second of them; None of a cell without figures."""
    if not isinstance(cell.outcome, Done):
        return None
    tokens = sum(len(trial.token_s) * trial.batch_size for trial in cell.trials)
    return _rate(tokens, sum(trial.decode_s for trial in cell.trials))


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


def _agreement(cell: CellRecord, baseline: CellRecord) -> float | None:
    """FP16 agrees with itself, which is no measurement."""
    return None if cell is baseline else mean_agreement(agreements([cell], [baseline]))


def _compare(row: CellMetrics, baseline: CellMetrics, agreement: float | None) -> CellMetrics:
    saved = _ratio(row.footprint_bytes, baseline.footprint_bytes)
    return msgspec.structs.replace(
        row,
        decode_versus_baseline=_ratio(row.decode_tok_s, baseline.decode_tok_s),
        end_to_end_versus_baseline=_ratio(row.end_to_end_tok_s, baseline.end_to_end_tok_s),
        saved_versus_baseline=None if saved is None else 1 - saved,
        agreement_with_baseline=agreement,
    )


def _ratio(value: float | None, baseline: float | None) -> float | None:
    return None if value is None or not baseline else value / baseline


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count and seconds else None
