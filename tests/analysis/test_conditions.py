"""The GPU's state during a trial, the flags raised for it, and the line printed for each.

Trials last a second here: prefill at whole seconds, decode 0.2 s later, the next edge at the next second.
"""

from typing import Any

import msgspec
import pytest
from analyses import warnings_of
from golden_text import Golden
from sample_records import DONE, edge, make_cell, make_job, make_run, make_trial, sample

from orchestrator.analysis.conditions import TrialConditions, flags, trial_conditions
from orchestrator.records.keys import key_of
from schemas.frames import Failed, WarmedUp
from schemas.job import Workload
from schemas.record import CellRecord, GpuState, MemoryReading, PhaseEdge

S = 1_000_000_000

COOL = GpuState(
    sm_clock_mhz=1980,
    memory_clock_mhz=2619,
    temperature_c=50,
    power_w=300.0,
    clock_limits=[],
    power_limited_s=0.0,
    thermal_limited_s=0.0,
)


def state(*clock_limits: str, **fields: Any) -> GpuState:
    return msgspec.structs.replace(COOL, **({"clock_limits": list(clock_limits)} | fields))


def make_edges(at_edges: list[GpuState | None]) -> list[PhaseEdge]:
    """Edges of one trial fewer than there are states: `at_edges[i]` is trial i's first, i+1 its last."""
    edges = [edge("warmup", -S, gpu=COOL)]
    for index, gpu in enumerate(at_edges[:-1]):
        edges.append(edge("prefill", index * S, trial=index, gpu=gpu))
        edges.append(edge("decode", index * S + S // 5, trial=index, gpu=gpu))
    return [*edges, edge("end", (len(at_edges) - 1) * S, gpu=at_edges[-1])]


def cell_of(
    *decode_s: float,
    precision: str = "fp16",
    at_edges: list[GpuState | None] | None = None,
    samples: Any = (),
    **fields: Any,
) -> CellRecord:
    """A cell of one trial per decode time, four decode steps each."""
    states = [COOL] * (len(decode_s) + 1) if at_edges is None else at_edges
    return make_cell(
        precision,
        trials=[make_trial(index, decode_s=value) for index, value in enumerate(decode_s)],
        edges=make_edges(states),
        samples=list(samples),
        **fields,
    )


def lines_of(cell: CellRecord) -> list[str]:
    return warnings_of(make_run(cell))


# Conditions


def test_a_trial_has_the_samples_between_its_edges() -> None:
    samples = [
        sample(-1, gpu=state(sm_clock_mhz=100, temperature_c=99)),
        sample(0, gpu=state(sm_clock_mhz=1900, power_w=300.0)),
        sample(S // 2, gpu=state("sw_power_cap", sm_clock_mhz=1500, power_w=600.0, temperature_c=70)),
        sample(S, gpu=state("applications_clocks_setting", sm_clock_mhz=1980, power_w=330.0)),
        sample(S + 1, gpu=state("hw_slowdown", sm_clock_mhz=200, temperature_c=98)),
    ]
    (conditions,) = trial_conditions(cell_of(0.4, samples=samples))
    assert conditions == TrialConditions(
        index=0,
        span_s=1.0,
        sm_clock_mhz=1900,
        lowest_sm_clock_mhz=1500,
        temperature_c=70,
        power_w=410.0,
        clock_limits=["applications_clocks_setting", "sw_power_cap"],
        power_limited_s=0.0,
        thermal_limited_s=0.0,
    )


def test_a_trial_shorter_than_the_sampling_period_uses_its_edges() -> None:
    at_edges = [state(sm_clock_mhz=1900, temperature_c=60, power_w=300.0), state(sm_clock_mhz=1700)]
    (conditions,) = trial_conditions(cell_of(0.4, at_edges=at_edges))  # prefill and decode, then the end
    assert (conditions.sm_clock_mhz, conditions.lowest_sm_clock_mhz) == (1900, 1700)
    assert (conditions.temperature_c, conditions.power_w) == (60, 300.0)


def test_limits_at_edges_are_added_to_those_of_samples() -> None:
    at_edges = [state("sync_boost"), state("sw_power_cap"), COOL]
    samples = [sample(S // 2, gpu=state("hw_slowdown", "sync_boost"))]
    first, second = trial_conditions(cell_of(0.4, 0.4, at_edges=at_edges, samples=samples))
    assert first.clock_limits == ["hw_slowdown", "sw_power_cap", "sync_boost"]
    assert second.clock_limits == ["sw_power_cap"]


def test_counters_are_reported_by_their_increase() -> None:
    counted = [(5.0, 1.0), (5.25, 1.0), (5.25, 1.5)]
    at_edges = [state(power_limited_s=power, thermal_limited_s=thermal) for power, thermal in counted]
    first, second = trial_conditions(cell_of(0.4, 0.4, at_edges=at_edges))
    assert (first.power_limited_s, first.thermal_limited_s) == (0.25, 0.0)
    assert (second.power_limited_s, second.thermal_limited_s) == (0.0, 0.5)


@pytest.mark.parametrize("at_edges", [[state(power_limited_s=None), COOL], [COOL, None]])
def test_a_counter_missing_at_one_edge_has_no_increase(at_edges: list[GpuState | None]) -> None:
    (conditions,) = trial_conditions(cell_of(0.4, at_edges=at_edges))
    assert conditions.power_limited_s is None


def test_limits_that_the_driver_does_not_report_are_unknown_and_not_throttling() -> None:
    silent = state(clock_limits=None)
    cell = cell_of(0.4, 0.4, at_edges=[silent, silent, COOL])
    assert [conditions.clock_limits for conditions in trial_conditions(cell)] == [None, []]
    assert flags(cell) == []


def test_a_figure_missing_from_some_samples_is_taken_from_the_others() -> None:
    samples = [
        sample(1, gpu=state(power_w=None, sm_clock_mhz=None)),
        sample(2, gpu=state(power_w=200.0)),
        MemoryReading(at_ns=3, reason="the GPU did not answer"),
    ]
    (conditions,) = trial_conditions(cell_of(0.4, samples=samples))
    assert (conditions.power_w, conditions.sm_clock_mhz) == (200.0, 1980)


def test_without_a_gpu_only_the_span_is_known() -> None:
    cell = cell_of(0.4, at_edges=[None, None], samples=[sample(S // 2, process=5)])
    assert trial_conditions(cell) == [TrialConditions(index=0, span_s=1.0)]


def test_a_trial_that_never_ended_has_unknown_conditions() -> None:
    cell = cell_of(0.4, 0.4)
    cut = msgspec.structs.replace(cell, edges=cell.edges[:-1])
    assert trial_conditions(cut)[1] == TrialConditions(index=1)
    assert trial_conditions(cut)[0].span_s == 1.0


def test_trials_without_edges_have_unknown_conditions() -> None:
    assert trial_conditions(make_cell()) == [TrialConditions(index=0)]


# Throttling


def test_a_cool_steady_cell_has_no_flag() -> None:
    cell = cell_of(0.4, 0.41, 0.4, warmed_up=WarmedUp(trial_s=[1.0, 1.0], settled=True))
    assert flags(cell) == []
    assert lines_of(cell) == []


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("sw_power_cap", "by the power limit (normal at full matrix load)"),
        ("sw_thermal_slowdown", "by heat"),
        ("hw_thermal_slowdown", "by heat"),
        ("hw_power_brake_slowdown", "by the power brake"),
        ("hw_slowdown", "by the hardware's emergency slowdown"),
    ],
)
def test_a_throttled_trial_is_reported_with_its_cause(limit: str, words: str, golden: Golden) -> None:
    cell = cell_of(0.4, 0.4, samples=[sample(S + 5, gpu=state(limit))])
    (flag,) = flags(cell)
    assert (flag.kind, flag.trials) == ("throttled", [1])
    (line,) = lines_of(cell)
    golden(line)
    assert line.startswith("fp16: ")
    assert words in line
    assert "trial 2;" in line


@pytest.mark.parametrize("limit", ["applications_clocks_setting", "display_clock_setting", "sync_boost"])
def test_clocks_set_by_a_user_are_not_throttling(limit: str) -> None:
    assert flags(cell_of(0.4, samples=[sample(5, gpu=state(limit))])) == []


@pytest.mark.parametrize(("limited_s", "throttled"), [(0.0, False), (0.009, False), (0.011, True)])
@pytest.mark.parametrize(
    ("counter", "words"), [("power_limited_s", "by the power limit"), ("thermal_limited_s", "by heat")]
)
def test_counters_catch_throttling_between_samples(
    counter: str, words: str, limited_s: float, throttled: bool
) -> None:
    cell = cell_of(0.4, 0.4, at_edges=[COOL, COOL, state(**{counter: limited_s})])
    found = flags(cell)
    assert [flag.trials for flag in found] == ([[1]] if throttled else [])
    assert all(words in flag.sentence for flag in found)


def test_several_causes_and_trials_share_a_line(golden: Golden) -> None:
    samples = [
        sample(S + 5, gpu=state("sw_power_cap")),
        sample(S + 9, gpu=state("sw_power_cap")),
        sample(3 * S + 5, gpu=state("sw_power_cap", "hw_thermal_slowdown")),
    ]
    cell = cell_of(*[0.4] * 5, samples=samples)
    assert [flag.trials for flag in flags(cell)] == [[1, 3]]
    (line,) = lines_of(cell)
    golden(line)
    assert "in trials 2, 4 and by heat in trial 4;" in line


def test_if_all_trials_were_throttled_their_numbers_are_left_out() -> None:
    samples = [sample(index * S + 5, gpu=state("sw_power_cap")) for index in range(3)]
    (line,) = lines_of(cell_of(0.4, 0.4, 0.4, samples=samples))
    assert "in every trial;" in line


# Times that differ


@pytest.mark.parametrize(("first_s", "flagged"), [(0.43, False), (0.439, False), (0.441, True), (0.8, True)])
def test_a_slow_first_trial_is_flagged(first_s: float, flagged: bool) -> None:
    kinds = [flag.kind for flag in flags(cell_of(first_s, 0.4, 0.4, 0.4))]
    assert ("slow-first" in kinds) == flagged


def test_the_first_trial_is_compared_with_the_others_only(golden: Golden) -> None:
    """Compared with the median of all four it would be at 9%."""
    (flag, _unstable) = flags(cell_of(0.45, 0.40, 0.40, 0.425))
    assert flag.kind == "slow-first"
    assert flag.trials == [0]
    golden(flag.sentence)
    assert " 12% slower " in flag.sentence
    assert "--warmup" in flag.sentence


def test_a_fast_first_trial_and_a_slow_later_one_are_unstable_only() -> None:
    cells = cell_of(0.35, 0.4, 0.4), cell_of(0.4, 0.4, 0.5)
    assert [[flag.kind for flag in flags(cell)] for cell in cells] == [["unstable"], ["unstable"]]


def test_the_variation_is_reported_with_its_extremes(golden: Golden) -> None:
    cell = cell_of(0.4, 0.36, 0.4, 0.41, 0.44)
    (flag,) = flags(cell)
    assert flag.trials == [1, 4]
    (line,) = lines_of(cell)
    golden(line)
    assert "by 20% of its median, from 90.0 (trial 2) to 110 ms (trial 5)" in line


@pytest.mark.parametrize(("slowest_s", "flagged"), [(0.439, False), (0.441, True)])
def test_a_tenth_of_the_median_is_stable(slowest_s: float, flagged: bool) -> None:
    assert bool(flags(cell_of(0.4, 0.4, slowest_s))) == flagged


def test_two_trials_are_too_few_to_compare() -> None:
    assert flags(cell_of(0.9, 0.4)) == []


def test_time_per_token_is_compared() -> None:
    """A trial that was cut short needs a quarter of the time for a quarter of the tokens."""
    cell = cell_of(0.4, 0.4, 0.4)
    short = make_trial(3, decode_s=0.1, token_s=[0.1], new_tokens=2, prompt_tokens=500, prefill_s=9.0)
    assert flags(msgspec.structs.replace(cell, trials=[*cell.trials, short])) == []


def test_a_single_new_token_leaves_nothing_to_compare() -> None:
    trials = [make_trial(index, decode_s=0.0, token_s=[], new_tokens=1) for index in range(3)]
    assert flags(make_cell(trials=trials)) == []


# Warm-up


@pytest.mark.parametrize(("settled", "flagged"), [(False, True), (True, False), (None, False)])
def test_a_warm_up_that_never_settled_is_flagged(settled: bool | None, flagged: bool) -> None:
    cell = cell_of(0.4, 0.4, warmed_up=WarmedUp(trial_s=[9.0, 1.0, 1.25], settled=settled))
    assert bool(flags(cell)) == flagged


def test_an_unsettled_warm_up_reports_its_length_and_last_difference(golden: Golden) -> None:
    cell = cell_of(0.4, 0.4, warmed_up=WarmedUp(trial_s=[9.0, 1.0, 0.75], settled=False))
    assert [flag.trials for flag in flags(cell)] == [[0, 1]]
    (line,) = lines_of(cell)
    golden(line)
    assert "its 3 trials" in line
    assert "by 25%" in line


# Several cells


def test_a_flag_of_several_cells_is_stated_once(golden: Golden) -> None:
    restless: dict[str, Any] = {"warmed_up": WarmedUp(trial_s=[9.0, 1.0, 1.25], settled=False)}
    cells = [cell_of(0.4, 0.4, 0.45, precision="fp16"), cell_of(0.4, 0.4, 0.52, precision="int8", **restless)]
    lines = warnings_of(make_run(*cells))
    assert lines[0].startswith("int8: warm-up never settled")
    golden(lines)
    (unstable,) = lines[1:]
    assert "by more than 10% between trials of fp16 (12%), int8 (30%)" in unstable
    both = [cell_of(0.4, 0.4, precision=name, **restless) for name in ("fp16", "int8")]
    (unsettled,) = warnings_of(make_run(*both))
    golden(unsettled)
    assert "fp16 (25%), int8 (25%)" in unsettled


def test_throttling_is_reported_for_each_cell() -> None:
    hot = [cell_of(0.4, samples=[sample(5, gpu=state("hw_slowdown"))], precision=name) for name in ("a", "b")]
    assert [line.split(":")[0] for line in warnings_of(make_run(*hot))] == ["a", "b"]


# All together


def test_a_cell_without_figures_has_no_flags() -> None:
    cell = cell_of(
        0.9,
        0.4,
        0.4,
        samples=[sample(5, gpu=state("hw_slowdown"))],
        warmed_up=WarmedUp(trial_s=[1.0, 2.0], settled=False),
    )
    assert len(flags(cell)) == 4
    assert flags(msgspec.structs.replace(cell, outcome=Failed(kind="crashed", message="gone"))) == []


def test_lines_name_their_cell_and_follow_general_warnings() -> None:
    job = make_job(workload=Workload(prompts=["one"], new_tokens=5, decode="graph"))
    cell = cell_of(0.8, 0.4, 0.4, job=job)
    skewed = msgspec.structs.replace(DONE, trials_planned=5)
    budget = make_cell("int8", outcome=skewed, job=make_job("int8", budget_s=5))
    lines = warnings_of(make_run(cell, budget))
    assert [line.split(": ")[0] for line in lines] == ["int8", "fp16 graph", "fp16 graph"]


@pytest.mark.parametrize(
    ("decode", "name"),
    [("eager", "fp16"), ("graph", "fp16 graph"), ("compile", "fp16 compile"), ("generate", "fp16 generate")],
)
def test_a_cell_name_includes_an_unusual_decode_mode(decode: Any, name: str) -> None:
    assert key_of(make_cell(job=make_job(workload=Workload(prompts=["one"], decode=decode)))).name == name


def test_a_cell_without_a_job_is_named_by_its_precision() -> None:
    assert key_of(make_cell(job=None)).name == "fp16"
