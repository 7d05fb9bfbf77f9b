"""Memory by phase: which edge belongs to which phase, peaks, and memory outside torch."""

import pytest
from analyses import memory_of
from hypothesis import given
from hypothesis import strategies as st
from sample_records import MIB, edge, make_cell, make_ready, sample, torch_memory

from orchestrator.analysis.memory.phases import PhaseMemory, phase_memory
from schemas.frames import Phase
from schemas.record import CellRecord, PhaseEdge, SamplerStats

EDGES = [
    edge("start", 0),
    edge("context", 100),
    edge("load", 200, torch=torch_memory(0), process=500, device=600),
    edge("warmup", 300, torch=torch_memory(1000, reserved=1200, peak=1500), process=1900, device=2000),
    edge(
        "prefill",
        400,
        torch=torch_memory(1010, reserved=1400, peak=1300),
        process=2100,
        device=2200,
        trial=0,
    ),
    edge(
        "decode",
        500,
        torch=torch_memory(1020, reserved=1400, peak=1390),
        process=2110,
        device=2210,
        trial=0,
    ),
    edge(
        "prefill",
        600,
        torch=torch_memory(1030, reserved=1400, peak=1250),
        process=2120,
        device=2220,
        trial=1,
    ),
    edge(
        "decode",
        700,
        torch=torch_memory(1025, reserved=1400, peak=1350),
        process=2115,
        device=2215,
        trial=1,
    ),
    edge("end", 800, torch=torch_memory(1000, reserved=1400, peak=1200), process=2130, device=2230),
]


def phases(cell: CellRecord) -> dict[str, PhaseMemory]:
    return {phase.phase: phase for phase in phase_memory(cell)}


def test_a_phase_has_the_figures_of_its_end() -> None:
    load = phases(make_cell(edges=EDGES))["load"]
    assert load.allocated_bytes == 1000
    assert load.reserved_bytes == 1200
    assert load.peak_allocated_bytes == 1500
    assert load.process_bytes == 1900
    assert load.device_bytes == 2000
    assert load.outside_torch_bytes == 700


def test_phases_are_listed_once_in_order_of_entry() -> None:
    assert list(phases(make_cell(edges=EDGES))) == [
        "start",
        "context",
        "load",
        "warmup",
        "prefill",
        "decode",
    ]


def test_recurring_phases_keep_the_last_end_and_the_highest_peak() -> None:
    found = phases(make_cell(edges=EDGES))
    # Prefill of trial 0 ends at the decode edge of trial 0, so its peak is what that edge read.
    assert found["prefill"].peak_allocated_bytes == 1390
    assert found["prefill"].allocated_bytes == 1025
    assert found["decode"].peak_allocated_bytes == 1250
    assert found["decode"].allocated_bytes == 1000
    assert found["decode"].process_bytes == 2130


def test_samples_belong_to_the_phase_of_their_time() -> None:
    samples = [sample(250, device=9000), sample(450, device=8000), sample(650, device=8500)]
    found = phases(make_cell(edges=EDGES, samples=samples))
    peaks = {name: (phase.sampled_peak_bytes, phase.sampled_peak_at_ns) for name, phase in found.items()}
    assert peaks["load"] == (9000, 250)
    assert peaks["prefill"] == (8500, 650)
    assert peaks["decode"] == (2230, 800)  # no sample, so its edge counts


def test_missing_readings_are_none() -> None:
    first = phases(make_cell(edges=EDGES))["start"]
    assert first.allocated_bytes is first.process_bytes is first.outside_torch_bytes is None
    assert first.sampled_peak_bytes is None
    silent = [PhaseEdge(phase=Phase(name=name, at_ns=0)) for name in ("load", "warmup")]
    assert phases(make_cell(edges=silent))["load"] == PhaseMemory(phase="load")


def test_if_the_process_is_hidden_memory_outside_torch_is_unknown() -> None:
    edges = [
        edge("load", 0),
        edge("warmup", 1, torch=torch_memory(10), device=50, reason="a container hides pids"),
    ]
    load = phases(make_cell(edges=edges))["load"]
    assert (load.process_bytes, load.outside_torch_bytes) == (None, None)
    assert (load.allocated_bytes, load.device_bytes) == (10, 50)


@pytest.mark.parametrize("count", [0, 1])
def test_without_two_edges_there_is_no_phase(count: int) -> None:
    cell = make_cell(edges=EDGES[:count])
    assert phase_memory(cell) == []
    assert memory_of(cell).loaded_bytes is None


def test_the_summary_on_a_gpu_has_torchs_footprint_and_peaks_after_load() -> None:
    summary = memory_of(make_cell(edges=EDGES))
    assert summary.on_gpu
    assert summary.loaded_bytes == 1000
    assert summary.peak_bytes == 1390  # not the 1500 of loading
    assert summary.nvml_peak_bytes == 2130


def test_nvmls_peak_is_the_highest_edge_after_load() -> None:
    edges = [
        edge("load", 0, process=5),
        edge("warmup", 1, process=10),
        edge("prefill", 2, process=20, trial=0),
        edge("decode", 3, process=90, trial=0),
        edge("prefill", 4, process=40, trial=1),
        edge("decode", 5, process=30, trial=1),
        edge("end", 6, process=25),
    ]
    assert memory_of(make_cell(edges=edges)).nvml_peak_bytes == 90


def test_the_summary_on_a_cpu_is_the_resident_set() -> None:
    edges = [
        edge("load", 0, process=5),
        edge("warmup", 10, process=70),
        edge("prefill", 20, process=80),
        edge("decode", 30, process=75),
        edge("end", 40, process=74),
    ]
    samples = [sample(5, process=990), sample(15, process=95)]
    summary = memory_of(make_cell(edges=edges, samples=samples, ready=make_ready(uuid=None)))
    assert not summary.on_gpu
    assert (summary.loaded_bytes, summary.peak_bytes, summary.nvml_peak_bytes) == (70, 95, None)


def test_a_resident_set_without_samples_has_no_peak() -> None:
    edges = [edge("load", 0, process=5), edge("warmup", 10, process=70), edge("end", 40, process=74)]
    sampler = SamplerStats(source="resident-set", samples=2, period_s=0.1, cpu_s=0, wall_s=1)
    summary = memory_of(make_cell(edges=edges, sampler=sampler, ready=make_ready(uuid=None)))
    assert (summary.loaded_bytes, summary.peak_bytes) == (70, None)


def test_a_worker_that_crashed_while_loading_has_no_footprint_and_no_peak() -> None:
    summary = memory_of(make_cell(edges=EDGES[:3]))
    assert (summary.loaded_bytes, summary.peak_bytes, summary.nvml_peak_bytes) == (None, None, None)


sizes = st.none() | st.integers(0, 2**40)
names = st.sampled_from(["load", "warmup", "prefill", "decode"])


@st.composite
def edge_lists(draw: st.DrawFn) -> list[PhaseEdge]:
    times = sorted(draw(st.lists(st.integers(0, 1000), min_size=2, max_size=8)))
    return [
        edge(
            draw(names),
            at_ns,
            torch=draw(st.none() | st.builds(torch_memory, st.integers(0, MIB), st.integers(MIB, 2 * MIB))),
            process=draw(sizes),
            device=draw(sizes),
        )
        for at_ns in times
    ]


@given(
    edge_lists(),
    st.lists(st.builds(lambda at, size: sample(at, device=size), st.integers(0, 1000), sizes), max_size=9),
)
def test_no_peak_is_below_an_edge_and_every_figure_was_read(
    edges: list[PhaseEdge], samples: list[object]
) -> None:
    read = {size for each in edges if each.reading for size in (each.reading.device_bytes,)}
    read |= {each.reading.process_bytes for each in edges if each.reading}
    read |= {each.device_bytes for each in samples}  # type: ignore[attr-defined]
    for phase in phase_memory(make_cell(edges=edges, samples=samples)):
        assert phase.sampled_peak_bytes in read | {None}
        if phase.device_bytes is not None:
            assert phase.sampled_peak_bytes is not None
            assert phase.sampled_peak_bytes >= phase.device_bytes
        if phase.allocated_bytes is not None:
            assert phase.peak_allocated_bytes is not None
            assert phase.peak_allocated_bytes >= phase.allocated_bytes
        known = phase.process_bytes is not None and phase.reserved_bytes is not None
        assert (phase.outside_torch_bytes is not None) == known
