"""Why a precision is as fast as it is, in one plain sentence made from numbers alone.

Four facts of a decode step carry every sentence: its wall time, the time in which the GPU was busy, the
bytes that it must read, and the kernel that took longest. Wall time that isn't busy time is the host's, or,
in a CUDA graph, that of the gaps between kernels. Busy time that the bytes don't account for is the
kernel's. Only what remains is a property of the format.

Cells are compared with FP16 in the same decode mode on the same workload. What holds back several cells
alike is said once.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from orchestrator.analysis.baselines import baseline_of, find_baselines
from orchestrator.analysis.bounds import Pace, decode_pace
from orchestrator.analysis.divergence import divergence_sentence, divergences
from orchestrator.analysis.metrics import measure_cell
from orchestrator.analysis.peaks import bandwidth_bytes_per_s, matrix_flop_per_s
from orchestrator.analysis.roofs import decode_step_bytes, seconds_per_step
from orchestrator.records.keys import by_workload, key_of
from orchestrator.records.names import workload_labels
from orchestrator.report.kernel_names import short_kernel_name
from orchestrator.units import milliseconds, percent, rate, ratio
from schemas.frames import Done, KernelTimes
from schemas.record import CellRecord, Run

HOST_FED = ("eager", "generate")
"""Decode modes in which the host issues every kernel. In the others a step is one CUDA graph."""

ALIKE = 0.05
"""Relative difference up to which two figures are called alike. A CUDA graph repeats itself within 0.2%, but
no one chooses a precision for less than this."""

PROMISE_KEPT = 0.8
"""Part of the ratio of bytes from which on a speed-up is the one that the bytes promise; attention, norms
and what stays unquantized take the rest."""

COPIES_BACK = 4
"""Copies to the host a step that aren't worth a word: `generate()` looks at every token to know the end."""


class DecodeFacts(NamedTuple):
    """What the sentences on a cell's decode are made from."""

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
        """Copies to the host a step, as far as they are among the kernels that took longest."""
        if self.kernels is None or not self.kernels.steps:
            return 0.0
        copies = (kernel.count for kernel in self.kernels.kernels if kernel.name.startswith("Memcpy DtoH"))
        return sum(copies) / self.kernels.steps


def explanations(run: Run) -> list[str]:
    """What there is to say below the table: first what invalidates speeds, then causes, then divergences."""
    groups = by_workload(run.cells)
    labels = workload_labels(groups)
    ranked = []
    for key, cells in groups.items():
        label = labels[key]
        told = _explain_workload(cells, run)
        ranked += [(rank, f"{label}: {line}" if label else line) for rank, line in told]
    return [line for _, line in sorted(ranked, key=lambda pair: pair[0])]


def decode_facts(cell: CellRecord, run: Run) -> DecodeFacts | None:
    """The facts of a cell whose decode was measured; None of any other."""
    tok_s, step_s = measure_cell(cell).decode_tok_s, seconds_per_step(cell)
    if tok_s is None or step_s is None:
        return None
    matrix = matrix_flop_per_s(run.peaks, cell.loaded.compute_dtype) if cell.loaded else None
    return DecodeFacts(
        cell=cell,
        name=key_of(cell).name,
        tok_s=tok_s,
        step_s=step_s,
        step_bytes=decode_step_bytes(cell),
        pace=decode_pace(cell, bandwidth_bytes_per_s(run.peaks), matrix),
        kernels=cell.profile.decode if cell.profile else None,
    )


def _explain_workload(cells: list[CellRecord], run: Run) -> Iterator[tuple[int, str]]:
    """Sentences with their rank, 0 the most important: about one a cell, fewer where cells are alike."""
    facts = [found for cell in cells if (found := decode_facts(cell, run))]
    if waiting := [one for one in facts if one.waits_for_host]:
        yield 0, f"{_host_bound(waiting)}; {_way_out(waiting, cells)}"
    alone: dict[str, list[DecodeFacts]] = {}
    for one in facts:
        if line := _comparison_within(one, facts):
            yield 3 if one.waits_for_host else 1, line
        elif one.pace.bound and not one.waits_for_host:  # a comparison would imply what holds it back
            alone.setdefault(one.pace.bound, []).append(one)
    yield from ((2, own_bound(alike)) for alike in alone.values())
    yield from ((4, divergence_sentence(found)) for found in divergences(cells))


# Cells by themselves


def _host_bound(waiting: list[DecodeFacts]) -> str:
    first, *others = waiting
    works, whose = f"{_range(waiting, 'busy_share')} of the time", "these speeds and their ratios are"
    if not others:
        works = f"{milliseconds(first.pace.busy_s_per_step)} ms of every {milliseconds(first.step_s)} ms"
        whose = "this speed is"
    return (
        f"{_subject(waiting)} launch-bound: the GPU works {works} and waits for the host, which issues "
        f"{_kernels(waiting)}{_copies_back(waiting)}; {whose} the host's, not the precision's"
    )


def _copies_back(waiting: list[DecodeFacts]) -> str:
    held = [one for one in waiting if one.copies_back > COPIES_BACK]
    if not held:
        return ""
    whose = "" if held == waiting else f", for {_listed(one.name for one in held)},"
    copies = _span((one.copies_back for one in held), "{:,.0f}".format)
    return f" and{whose} waits for {copies} copies back to it"


def _way_out(waiting: list[DecodeFacts], cells: list[CellRecord]) -> str:
    """Where the precisions' own speeds can be read, or how they can be had."""
    graphs = [cell for cell in cells if key_of(cell).decode == "graph"]
    if not graphs:
        return "try --decode graph"
    measured = {cell.precision for cell in graphs if isinstance(cell.outcome, Done)}
    names = dict.fromkeys(one.cell.precision for one in waiting)
    told = {
        "see": [f"{name} graph" for name in names if name in measured],
        "there is no graph of": [name for name in names if name not in measured],
    }
    return "; ".join(f"{start} {_listed(some)}" for start, some in told.items() if some)


def own_bound(cells: list[DecodeFacts]) -> str:
    """What holds back these cells, all of them the same and none of them the host."""
    first, *others = cells
    held_by, subject = first.pace.bound, _subject(cells)
    if held_by == "compute":
        done = f"{_range(cells, 'mfu')} of the arithmetic that this GPU can do"
        return f"{subject} compute-bound, doing {done}"
    if held_by == "launch":
        return f"{subject} launch-bound within a CUDA graph: {_works(cells)}, and idle between them"
    draws = f"{_range(cells, 'mbu')} of what the memory can deliver"
    if held_by == "kernel":
        mean_s = (first.pace.busy_s_per_step or 0.0) / (first.pace.launches_per_step or 1.0)
        detail = f"; a kernel takes {mean_s * 1e6:.1f} µs on average{_top_kernel(first)}"
        return f"{subject} kernel-bound: {_works(cells)}, but draws {draws}{'' if others else detail}"
    roof_tok_s = first.tok_s / (first.pace.mbu or 1.0)
    speeds = f": {_span((one.tok_s for one in cells), rate)} of at most {rate(roof_tok_s)} tok/s"
    alike = len({one.cell.precision for one in cells}) == 1  # and so the roof is
    return f"{subject} bandwidth-bound, drawing {draws}{speeds if alike else ''}"


def _works(cells: list[DecodeFacts]) -> str:
    return f"the GPU is busy {_range(cells, 'busy_share')} of the time with {_kernels(cells)}"


# A cell against FP16


def _comparison_within(one: DecodeFacts, facts: list[DecodeFacts]) -> str | None:
    cell = baseline_of(one.cell, find_baselines(other.cell for other in facts))
    baseline = next((other for other in facts if other.cell is cell), one)
    return None if baseline is one else comparison(one, baseline)


def comparison(one: DecodeFacts, baseline: DecodeFacts) -> str | None:
    """Why a cell is faster or slower than FP16 in the same decode mode; None where nothing tells."""
    speed = one.tok_s / baseline.tok_s
    fewer = baseline.step_bytes / one.step_bytes if one.step_bytes and baseline.step_bytes else None
    kept = speed >= PROMISE_KEPT * (fewer or 1.0)
    start = f"{one.name} runs at {ratio(speed)} FP16's speed"
    mine, others = one.pace, baseline.pace
    if mine.busy_s_per_step is None or others.busy_s_per_step is None:
        return None
    gpu_speed = others.busy_s_per_step / mine.busy_s_per_step
    step_s = f"{milliseconds(mine.busy_s_per_step)} against {milliseconds(others.busy_s_per_step)} ms"
    busy = f"the GPU is busy {percent(mine.busy_share)} of the time against {percent(others.busy_share)}"
    if waits := _waits(one, baseline):
        alone = f"in GPU time alone it would be {ratio(gpu_speed)}, {step_s} a {_step(one)}"
        counts = f"{mine.launches_per_step or 0:,.0f} against {_kernels([baseline])}"
        return f"{start}, but {waits}: {counts}, and {busy}; {alone}"
    line = f"{start}{_bytes(fewer, kept)}: {step_s} of GPU time a {_step(one)}"
    if not _alike(speed, gpu_speed):
        line += f", and {busy}"
    if kept:
        return line
    return line + (f"; {own_bound([one])}" if mine.bound == "compute" else _top_kernel(one))


def _waits(one: DecodeFacts, baseline: DecodeFacts) -> str:
    """Which of two cells in the same decode mode leave the GPU idle, and what for."""
    idle = [name for name, cell in (("it", one), ("FP16", baseline)) if cell.pace.bound == "launch"]
    if not idle:
        return ""
    waits = "both wait" if len(idle) == 2 else f"{idle[0]} waits"
    return f"{waits} {'for the host' if key_of(one.cell).decode in HOST_FED else 'between kernels'}"


def _bytes(fewer: float | None, kept: bool) -> str:
    """What the cell reads against FP16, and whether its speed is what that promises."""
    if fewer is None:
        return ""
    if _alike(fewer, 1.0):
        return ", reading as many bytes"
    if fewer < 1:
        return f", reading {1 / fewer:.1f}× as many bytes"
    return f"{', reading' if kept else ', though it reads'} {fewer:.1f}× fewer bytes"


# Parts of sentences


def _top_kernel(one: DecodeFacts) -> str:
    """The kernel that took longest, and the most that it can have drawn from memory.

    That most would be so if this kernel alone moved all the bytes of a step.
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
    return f"{text} and reads at most {percent(most)} of what the memory can deliver"


def _kernels(cells: list[DecodeFacts]) -> str:
    counts = [one.pace.launches_per_step or 0 for one in cells]
    return f"{_span(counts, '{:,.0f}'.format)} kernels a {_step(cells[0])}"


def _range(cells: list[DecodeFacts], share: str) -> str:
    """The shares that these cells reached of something in `Pace`, which is known for all of them."""
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
    """What a decode step makes, as a reader would call it."""
    return "token" if all(trial.batch_size == 1 for trial in one.cell.trials) else "step"
