"""The GPU's state during each timed trial, and which trials to read with care: pure functions over records.

A GPU has no single speed. It lowers its clocks when it draws too much power, when it gets hot, or when the
host asks; a trial during such a moment is slower for a reason unrelated to precision. There are two sources,
since neither catches everything:

- samples, a tenth of a second apart, and the readings at the trial's edges: the clock limits at those
  instants;
- the driver's counters, read at edges: how long power or heat limited the clocks, also between samples.

Other causes leave no trace in NVML, so the times themselves are compared too: the first trial with the
others, the fastest with the slowest, the last two of the warm-up. Prompts differ in length, and so do their
TTFTs, so decode time per step is compared. A flagged trial is reported, never dropped.
"""

from collections.abc import Callable, Iterable, Iterator
from statistics import fmean, median
from typing import Literal, TypeVar

import msgspec

from orchestrator.units import milliseconds, percent
from schemas.frames import Done, Trial
from schemas.record import CellRecord, GpuState, MemoryReading, PhaseEdge

LIMITED_SHARE = 0.01
"""A trial whose clocks, by the driver's counters, were limited for more than this share was throttled."""

DIFFERENCE = 0.1
"""Decode times may differ by this share of the median before there is a warning."""

FEWEST_TRIALS = 3
"""Of two trials that differ, neither is known to be the outlier."""

_POWER, _HEAT = "the power limit (normal at full matrix load)", "heat"

_CAUSES: dict[str, frozenset[str]] = {
    _POWER: frozenset({"sw_power_cap"}),
    _HEAT: frozenset({"sw_thermal_slowdown", "hw_thermal_slowdown"}),
    "the power brake (power supply)": frozenset({"hw_power_brake_slowdown"}),
    "the hardware's emergency slowdown": frozenset({"hw_slowdown"}),
}
"""Cause in words → the clock limits that indicate it. Clocks set by a user aren't throttling."""

FlagKind = Literal["never-settled", "throttled", "slow-first", "unstable"]

Figure = TypeVar("Figure")
"""A figure that may be unknown."""


class TrialConditions(msgspec.Struct, frozen=True, kw_only=True):
    """The GPU's state from a trial's prefill edge to the edge after its decode; None if unknown.

    If a trial is too short for a sample, the readings at its edges are used.
    """

    index: int
    span_s: float | None = None
    """Between those two edges."""
    sm_clock_mhz: float | None = None
    """Median."""
    lowest_sm_clock_mhz: int | None = None
    temperature_c: int | None = None
    """Highest."""
    power_w: float | None = None
    """Mean."""
    clock_limits: list[str] | None = None
    """All that were seen, in samples or at edges, by their NVML names, sorted."""
    power_limited_s: float | None = None
    """Time in which the power limit held the clocks down, by the driver's counter."""
    thermal_limited_s: float | None = None


class Flag(msgspec.Struct, frozen=True, kw_only=True):
    """A reason to read a cell's figures with care, and the trials it concerns; they are kept."""

    kind: FlagKind
    trials: list[int]
    """Indices, from 0 as in records; `sentence` counts from 1."""
    sentence: str
    difference: float | None = None
    """Relative difference of the times; None if the flag isn't about times."""


def trial_conditions(cell: CellRecord) -> list[TrialConditions]:
    """One entry per timed trial, in order."""
    return [
        _conditions(trial.index, _edges_of(trial.index, cell.edges), cell.samples) for trial in cell.trials
    ]


def flags(cell: CellRecord) -> list[Flag]:
    """What a reader of this cell's row must know; empty for a cell without figures."""
    if not isinstance(cell.outcome, Done):
        return []
    found = (_never_settled(cell), _throttled(cell), _slow_first(cell.trials), _unstable(cell.trials))
    return [flag for flag in found if flag]


def _edges_of(index: int, edges: list[PhaseEdge]) -> list[PhaseEdge]:
    """Prefill, decode and the edge that ends them; empty if the worker did not get that far."""
    own = [position for position, edge in enumerate(edges) if edge.phase.trial == index]
    return edges[own[0] : own[-1] + 2] if own and own[-1] + 1 < len(edges) else []


def _conditions(index: int, edges: list[PhaseEdge], samples: list[MemoryReading]) -> TrialConditions:
    if not edges:
        return TrialConditions(index=index)
    start_ns, end_ns = edges[0].phase.at_ns, edges[-1].phase.at_ns
    during = [sample.gpu for sample in samples if sample.gpu and start_ns <= sample.at_ns <= end_ns]
    at_edges = [edge.reading.gpu for edge in edges if edge.reading and edge.reading.gpu]
    states = during or at_edges
    clocks = _known(state.sm_clock_mhz for state in states)
    return TrialConditions(
        index=index,
        span_s=(end_ns - start_ns) / 1e9,
        sm_clock_mhz=median(clocks) if clocks else None,
        lowest_sm_clock_mhz=min(clocks, default=None),
        temperature_c=max(_known(state.temperature_c for state in states), default=None),
        power_w=_mean(_known(state.power_w for state in states)),
        clock_limits=_union(_known(state.clock_limits for state in (*during, *at_edges))),
        power_limited_s=_growth(edges, lambda state: state.power_limited_s),
        thermal_limited_s=_growth(edges, lambda state: state.thermal_limited_s),
    )


def _known(values: Iterable[Figure | None]) -> list[Figure]:
    return [value for value in values if value is not None]


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None


def _union(lists: list[list[str]]) -> list[str] | None:
    return sorted(set().union(*lists)) if lists else None


def _growth(edges: list[PhaseEdge], counter: Callable[[GpuState], float | None]) -> float | None:
    """Increase of a counter between the first edge and the last, in the counter's unit."""
    states = [edge.reading.gpu if edge.reading else None for edge in (edges[0], edges[-1])]
    counts = _known(counter(state) for state in states if state)
    return counts[1] - counts[0] if len(counts) == 2 else None


def _throttled(cell: CellRecord) -> Flag | None:
    by_cause: dict[str, list[int]] = {}
    for conditions in trial_conditions(cell):
        for cause in _causes(conditions):
            by_cause.setdefault(cause, []).append(conditions.index)
    if not by_cause:
        return None
    parts = [f"by {cause} in {_named(trials, cell.trials)}" for cause, trials in by_cause.items()]
    return Flag(
        kind="throttled",
        trials=sorted({index for trials in by_cause.values() for index in trials}),
        sentence=f"the GPU's clocks were limited {' and '.join(parts)}; all trials are kept",
    )


def _causes(conditions: TrialConditions) -> Iterator[str]:
    counted_s = {_POWER: conditions.power_limited_s, _HEAT: conditions.thermal_limited_s}
    for cause, limits in _CAUSES.items():
        limited_s = counted_s.get(cause) or 0.0
        long = limited_s > LIMITED_SHARE * (conditions.span_s or 0.0)
        if long or not limits.isdisjoint(conditions.clock_limits or ()):
            yield cause


def _named(indices: list[int], trials: list[Trial]) -> str:
    if len(indices) == len(trials):
        return "every trial"
    numbers = ", ".join(str(index + 1) for index in indices)
    return f"trial {numbers}" if len(indices) == 1 else f"trials {numbers}"


def _slow_first(trials: list[Trial]) -> Flag | None:
    steps_s = _step_times_s(trials)
    if len(steps_s) < FEWEST_TRIALS or 0 not in steps_s:
        return None
    others_s = median(step_s for index, step_s in steps_s.items() if index != 0)
    slower = steps_s[0] / others_s - 1
    if slower <= DIFFERENCE:
        return None
    return Flag(
        kind="slow-first",
        trials=[0],
        sentence=f"the first timed trial decoded {percent(slower)} slower per token than the median of the "
        "others, as if it were still warming up; it is kept, and a higher --warmup may help",
    )


def _unstable(trials: list[Trial]) -> Flag | None:
    steps_s = _step_times_s(trials)
    if len(steps_s) < FEWEST_TRIALS:
        return None
    fastest, slowest = min(steps_s, key=steps_s.__getitem__), max(steps_s, key=steps_s.__getitem__)
    spread = (steps_s[slowest] - steps_s[fastest]) / median(steps_s.values())
    if spread <= DIFFERENCE:
        return None
    return Flag(
        kind="unstable",
        trials=sorted([fastest, slowest]),
        difference=spread,
        sentence=f"decode time per token varied by {percent(spread)} of its median, from "
        f"{milliseconds(steps_s[fastest])} (trial {fastest + 1}) to {milliseconds(steps_s[slowest])} ms "
        f"(trial {slowest + 1}); all are kept, so read small differences between rows with care",
    )


def _step_times_s(trials: list[Trial]) -> dict[int, float]:
    """Trial index → decode seconds per step; a trial that generated a single token has no steps."""
    return {trial.index: trial.decode_s / len(trial.token_s) for trial in trials if trial.token_s}


def _never_settled(cell: CellRecord) -> Flag | None:
    if cell.warmed_up is None or cell.warmed_up.settled is not False:
        return None
    *_, before_s, last_s = cell.warmed_up.trial_s
    difference = abs(last_s - before_s) / before_s
    return Flag(
        kind="never-settled",
        trials=[trial.index for trial in cell.trials],
        difference=difference,
        sentence=f"warm-up never settled: the last two of its {len(cell.warmed_up.trial_s)} trials still "
        f"differed by {percent(difference)}; the timed trials after it are kept",
    )
