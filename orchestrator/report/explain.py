"""Why a precision runs at its speed: one plain sentence, built only from measured numbers.

Every sentence rests on four facts about a decode step: its wall time, its GPU-busy time, the bytes that it
must read, and the slowest kernel. Wall time beyond the busy time is due to the host, or, in a CUDA graph, to
gaps between kernels. Busy time that the bytes don't explain is due to the kernels. Only the remainder is a
property of the format.

Cells are compared with FP16 in the same decode mode on the same workload. A limit shared by several cells is
stated once.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from orchestrator.analysis.baselines import baseline_of, find_baselines
from orchestrator.analysis.bounds import Pace
from orchestrator.analysis.divergence import Divergence, divergence_sentence
from orchestrator.analysis.metrics import CellAnalysis
from orchestrator.analysis.roofs import decode_step_bytes, seconds_per_step
from orchestrator.analysis.run_analysis import RunAnalysis
from orchestrator.records.keys import NO_WORKLOAD, WorkloadKey, key_of
from orchestrator.records.names import workload_labels
from orchestrator.report.kernel_names import short_kernel_name
from orchestrator.units import milliseconds, percent, rate, ratio
from schemas.frames import Done, KernelTimes
from schemas.record import CellRecord

HOST_FED = ("eager", "generate")
"""Decode modes in which the host launches every kernel. In the others a step is one CUDA graph."""

ALIKE = 0.05
"""Relative difference up to which two figures count as equal. A CUDA graph is reproducible within 0.2%, but
nobody chooses a precision for a smaller gain than this."""

PROMISE_KEPT = 0.8
"""A speed-up of at least this share of the byte ratio counts as the one that the bytes promise; attention,
norms and unquantized layers account for the rest."""

COPIES_BACK = 4
"""Copies to the host per step that need no mention: `generate()` checks every token for the end."""


class DecodeFacts(NamedTuple):
    """The facts behind the sentences about a cell's decode."""

    cell: CellRecord
    name: str
    tok_s: float
    step_s: float
    step_bytes: float | None
    pace: Pace
    kernels: KernelTimes | None

    @property
    def waits_for_host(self) -> bool:
        return self.pace.bound == "launch" and key_of(self.cell).decode in HOST_FED

    @property
    def copies_back(self) -> float:
        """Copies to the host per step, as far as they are among the slowest kernels."""
        if self.kernels is None or not self.kernels.steps:
            return 0.0
        copies = (kernel.count for kernel in self.kernels.kernels if kernel.name.startswith("Memcpy DtoH"))
        return sum(copies) / self.kernels.steps


def explanations(analysis: RunAnalysis) -> list[str]:
    """Sentences for below the table: first limits that invalidate speeds, then causes, then divergences."""
    groups: dict[WorkloadKey, list[CellAnalysis]] = {}
    for each in analysis.cells:
        groups.setdefault(key_of(each.cell).workload, []).append(each)
    groups.pop(NO_WORKLOAD, None)
    labels = workload_labels(groups)
    ranked = []
    for key, cells in groups.items():
        label = labels[key]
        lines = _explain_workload(cells, analysis.divergences[key])
        ranked += [(rank, f"{label}: {line}" if label else line) for rank, line in lines]
    return [line for _, line in sorted(ranked, key=lambda pair: pair[0])]


def decode_facts(analysis: CellAnalysis) -> DecodeFacts | None:
    """The facts of a cell whose decode was measured; None for any other."""
    cell = analysis.cell
    tok_s, step_s = analysis.row.decode_tok_s, seconds_per_step(cell)
    if tok_s is None or step_s is None:
        return None
    return DecodeFacts(
        cell=cell,
        name=key_of(cell).name,
        tok_s=tok_s,
        step_s=step_s,
        step_bytes=decode_step_bytes(cell),
        pace=analysis.pace,
        kernels=cell.profile.decode if cell.profile else None,
    )


def _explain_workload(cells: list[CellAnalysis], divergences: list[Divergence]) -> Iterator[tuple[int, str]]:
    """Sentences with their rank, 0 the most important: about one per cell, fewer if cells share a limit."""
    facts = [found for cell in cells if (found := decode_facts(cell))]
    if waiting := [one for one in facts if one.waits_for_host]:
        yield 0, f"{_host_bound(waiting)}; {_remedy(waiting, [each.cell for each in cells])}"
    alone: dict[str, list[DecodeFacts]] = {}
    for one in facts:
        if line := _comparison_within(one, facts):
            yield 3 if one.waits_for_host else 1, line
        elif one.pace.bound and not one.waits_for_host:  # a comparison would imply its limit
            alone.setdefault(one.pace.bound, []).append(one)
    yield from ((2, own_bound(alike)) for alike in alone.values())
    yield from ((4, divergence_sentence(found)) for found in divergences)


# Cells on their own


def _host_bound(waiting: list[DecodeFacts]) -> str:
    first, *others = waiting
    busy, speeds = f"{_range(waiting, 'busy_share')} of the time", "these speeds and their ratios reflect"
    if not others:
        busy = f"{milliseconds(first.pace.busy_s_per_step)} ms of every {milliseconds(first.step_s)} ms"
        speeds = "this speed reflects"
    return (
        f"{_subject(waiting)} launch-bound: the GPU is busy {busy} and waits for the host, which launches "
        f"{_kernels(waiting)}{_copies_back(waiting)}; {speeds} the host, not the precision"
    )


def _copies_back(waiting: list[DecodeFacts]) -> str:
    held = [one for one in waiting if one.copies_back > COPIES_BACK]
    if not held:
        return ""
    which = "" if held == waiting else f", for {_listed(one.name for one in held)},"
    copies = _span((one.copies_back for one in held), "{:,.0f}".format)
    return f" and{which} waits for {copies} copies back to it"


def _remedy(waiting: list[DecodeFacts], cells: list[CellRecord]) -> str:
    """Which rows show the speeds of the precisions themselves, or how to get such rows."""
    graphs = [cell for cell in cells if key_of(cell).decode == "graph"]
    if not graphs:
        return "try --decode graph"
    measured = {cell.precision for cell in graphs if isinstance(cell.outcome, Done)}
    names = dict.fromkeys(one.cell.precision for one in waiting)
    parts = {
        "see": [f"{name} graph" for name in names if name in measured],
        "there is no graph row for": [name for name in names if name not in measured],
    }
    return "; ".join(f"{start} {_listed(some)}" for start, some in parts.items() if some)


def own_bound(cells: list[DecodeFacts]) -> str:
    """The limit that these cells share, when it isn't the host."""
    first, *others = cells
    held_by, subject = first.pace.bound, _subject(cells)
    if held_by == "compute":
        return f"{subject} compute-bound, at {_range(cells, 'mfu')} of the measured peak arithmetic rate"
    if held_by == "launch":
        return f"{subject} launch-bound within a CUDA graph: {_busy(cells)}, and idle between them"
    bandwidth = f"{_range(cells, 'mbu')} of the measured peak bandwidth"
    if held_by == "kernel":
        mean_s = (first.pace.busy_s_per_step or 0.0) / (first.pace.launches_per_step or 1.0)
        detail = f"; a kernel takes {mean_s * 1e6:.1f} µs on average{_top_kernel(first)}"
        return f"{subject} kernel-bound: {_busy(cells)}, but reads at {bandwidth}{'' if others else detail}"
    roof_tok_s = first.tok_s / (first.pace.mbu or 1.0)
    speeds = f": {_span((one.tok_s for one in cells), rate)} of at most {rate(roof_tok_s)} tok/s"
    same_roof = len({one.cell.precision for one in cells}) == 1
    return f"{subject} bandwidth-bound, reading at {bandwidth}{speeds if same_roof else ''}"


def _busy(cells: list[DecodeFacts]) -> str:
    return f"the GPU is busy {_range(cells, 'busy_share')} of the time with {_kernels(cells)}"


# A cell compared with FP16


def _comparison_within(one: DecodeFacts, facts: list[DecodeFacts]) -> str | None:
    cell = baseline_of(one.cell, find_baselines(other.cell for other in facts))
    baseline = next((other for other in facts if other.cell is cell), one)
    return None if baseline is one else comparison(one, baseline)


def comparison(one: DecodeFacts, baseline: DecodeFacts) -> str | None:
    """Why a cell is faster or slower than FP16 in the same decode mode; None without kernel times."""
    speed = one.tok_s / baseline.tok_s
    fewer = baseline.step_bytes / one.step_bytes if one.step_bytes and baseline.step_bytes else None
    kept = speed >= PROMISE_KEPT * (fewer or 1.0)
    start = f"{one.name} runs at {ratio(speed)} FP16's speed"
    mine, others = one.pace, baseline.pace
    if mine.busy_s_per_step is None or others.busy_s_per_step is None:
        return None
    gpu_speed = others.busy_s_per_step / mine.busy_s_per_step
    step_s = f"{milliseconds(mine.busy_s_per_step)} vs. {milliseconds(others.busy_s_per_step)} ms"
    busy = f"the GPU is busy {percent(mine.busy_share)} of the time vs. {percent(others.busy_share)}"
    if waits := _waits(one, baseline):
        alone = f"by GPU time alone it would be {ratio(gpu_speed)}, {step_s} per {_step(one)}"
        counts = f"{mine.launches_per_step or 0:,.0f} vs. {_kernels([baseline])}"
        return f"{start}, but {waits}: {counts}, and {busy}; {alone}"
    line = f"{start}{_bytes(fewer, kept)}: {step_s} of GPU time per {_step(one)}"
    if not _alike(speed, gpu_speed):
        line += f", and {busy}"
    if kept:
        return line
    return line + (f"; {own_bound([one])}" if mine.bound == "compute" else _top_kernel(one))


def _waits(one: DecodeFacts, baseline: DecodeFacts) -> str:
    """Which of two cells in the same decode mode leave the GPU idle, and why."""
    idle = [name for name, cell in (("it", one), ("FP16", baseline)) if cell.pace.bound == "launch"]
    if not idle:
        return ""
    waits = "both wait" if len(idle) == 2 else f"{idle[0]} waits"
    return f"{waits} {'for the host' if key_of(one.cell).decode in HOST_FED else 'between kernels'}"


def _bytes(fewer: float | None, kept: bool) -> str:
    """Bytes read compared with FP16, and whether the speed-up matches."""
    if fewer is None:
        return ""
    if _alike(fewer, 1.0):
        return ", reading the same number of bytes"
    if fewer < 1:
        return f", reading {1 / fewer:.1f}× as many bytes"
    return f"{', reading' if kept else ', though it reads'} {fewer:.1f}× fewer bytes"


# Parts of sentences


def _top_kernel(one: DecodeFacts) -> str:
    """The slowest kernel, and an upper limit on the bandwidth that it reached.

    The limit assumes that this kernel alone moved all the bytes of a step.
    """
    times = one.kernels
    if times is None or not times.kernels or not times.kernels[0].total_s:
        return ""
    top = times.kernels[0]
    share = percent(min(top.total_s / times.busy_s, 1.0))
    text = f"; `{short_kernel_name(top.name)}` takes {share} of the GPU time"
    most = one.pace.mbu and one.pace.mbu * one.step_s / (top.total_s / times.steps)
    if most is None or most >= 1:
        return text
    return f"{text} and reads at no more than {percent(most)} of the measured peak bandwidth"


def _kernels(cells: list[DecodeFacts]) -> str:
    counts = [one.pace.launches_per_step or 0 for one in cells]
    return f"{_span(counts, '{:,.0f}'.format)} kernels per {_step(cells[0])}"


def _range(cells: list[DecodeFacts], share: str) -> str:
    """The range over these cells of a share in `Pace`, which is known for all of them."""
    return _span((getattr(one.pace, share) for one in cells), percent)


def _span(values: Iterable[float], show: Callable[[float], str]) -> str:
    shown = [show(value) for value in sorted(values)]
    return shown[0] if shown[0] == shown[-1] else f"{shown[0]} to {shown[-1]}"


def _alike(one: float, other: float) -> bool:
    return 1 / (1 + ALIKE) <= one / other <= 1 + ALIKE


def _subject(cells: list[DecodeFacts]) -> str:
    return f"{_listed(one.name for one in cells)} {'is' if len(cells) == 1 else 'are'}"


def _listed(names: Iterable[str]) -> str:
    *others, last = dict.fromkeys(names)
    return f"{', '.join(others)} and {last}" if others else last


def _step(one: DecodeFacts) -> str:
    """A decode step by the reader's word: at batch 1 it generates one token."""
    return "token" if all(trial.batch_size == 1 for trial in one.cell.trials) else "step"
