"""Each precision in its fastest decode mode, compared with FP16 in its fastest one.

Within one mode a ratio shows what a precision changes, but nobody runs a precision in a mode that doesn't
suit it. A kernel that torch.compile can't trace may be fastest as a CUDA graph, while FP16 gains most from
compilation: a user's gain is the ratio of the two best modes. Larger batches take the gain away again, since
the weights are then read once for many sequences, and arithmetic counts.
"""

from collections.abc import Iterator

import msgspec

from orchestrator.analysis.metrics import CellMetrics
from orchestrator.records.keys import BASELINE, WorkloadKey
from orchestrator.units import ratio
from schemas.job import DecodeMode

LEAD = 1.05
"""The smallest speed-up that counts as a lead: nobody would choose a precision for less."""


class Best(msgspec.Struct, frozen=True, kw_only=True):
    """The fastest decode mode of a precision on a workload."""

    precision: str
    decode: DecodeMode
    prompt_tokens: int | None
    depth: int
    batch_size: int
    new_tokens: int | None
    decode_tok_s: float
    versus_baseline: float | None
    """Over FP16's best on the same workload; None if FP16 was not measured on it."""
    baseline_decode: DecodeMode | None
    host_bound: bool
    """Whether one of the two waits for the host, so that their ratio doesn't reflect the precision."""

    @property
    def workload(self) -> WorkloadKey:
        return WorkloadKey(self.prompt_tokens, self.depth, self.batch_size, self.new_tokens or 0)


def best_modes(rows: list[CellMetrics]) -> list[Best]:
    """One for each measured precision and workload, in the order of `rows`."""
    fastest: dict[tuple[str, WorkloadKey], CellMetrics] = {}
    for row in rows:
        key = (row.precision, row.workload)
        if row.decode_tok_s and row.decode_tok_s > (fastest[key].decode_tok_s or 0 if key in fastest else 0):
            fastest[key] = row
    return [_best(row, fastest.get((BASELINE, row.workload))) for row in fastest.values()]


def leads(bests: list[Best]) -> Iterator[str]:
    """A sentence for each precision that leads FP16 at its smallest batch: up to which batch it leads."""
    groups: dict[tuple[str, WorkloadKey], list[Best]] = {}
    for best in bests:
        if best.versus_baseline is not None and not best.host_bound and best.precision != BASELINE:
            any_batch = best.workload._replace(batch_size=1)
            groups.setdefault((best.precision, any_batch), []).append(best)
    for group in groups.values():
        if line := _lead(sorted(group, key=lambda best: best.batch_size)):
            yield line


def _best(row: CellMetrics, baseline: CellMetrics | None) -> Best:
    versus = None
    if baseline is not None and row.decode_tok_s and baseline.decode_tok_s:
        versus = row.decode_tok_s / baseline.decode_tok_s
    return Best(
        precision=row.precision,
        decode=row.decode,
        prompt_tokens=row.prompt_tokens,
        depth=row.depth,
        batch_size=row.batch_size,
        new_tokens=row.new_tokens,
        decode_tok_s=row.decode_tok_s or 0.0,
        versus_baseline=versus,
        baseline_decode=baseline.decode if baseline else None,
        host_bound=any(each is not None and each.decode_bound == "launch" for each in (row, baseline)),
    )


def _lead(group: list[Best]) -> str | None:
    """The sentence for one precision, by increasing batch size; None if it never leads."""
    ahead = [(best.versus_baseline or 0) >= LEAD for best in group]
    if len(group) < 2 or not ahead[0]:
        return None
    first, name = group[0], f"{group[0].precision}, best mode against best mode,"
    start = f"{name} runs at {ratio(first.versus_baseline)} FP16's speed at batch {first.batch_size}"
    if all(ahead):
        last = group[-1]
        return f"{start} and still leads at {last.batch_size} ({ratio(last.versus_baseline)})"
    last, lost = group[ahead.index(False) - 1], group[ahead.index(False)]
    until = "" if last is first else f", leads up to {last.batch_size} ({ratio(last.versus_baseline)})"
    return f"{start}{until} and loses its lead at {lost.batch_size} ({ratio(lost.versus_baseline)})"
