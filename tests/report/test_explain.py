"""The sentences below the table, on the figures that one H100 gave; and silence where nothing is known."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_records import H100_PEAKS, QWEN_HALF_B, h100_cell, make_cell, make_run, make_trial

from orchestrator.report.explain import comparison, decode_facts, explanations
from schemas.frames import Failed, Kernel, Peaks, Profile
from schemas.job import DecodeMode
from schemas.record import CellRecord, PeaksRecord, Skipped

INT8_BYTES, NF4_BYTES, AWQ_BYTES = 7_622_000_000, 4_763_000_000, 4_535_000_000
HALF_B_INT8_BYTES = 630_000_000
NO_PEAKS = PeaksRecord(outcome=Failed(kind="error", message="boom"), wall_s=1)
NO_CAPTURE = Failed(kind="unsupported", message="its outlier path synchronises")
TRITON = "triton_red_fused__unsafe_view_mm_mul_silu_t_view_11"


def fp16_eager(**fields: Any) -> CellRecord:
    return h100_cell("fp16", "eager", **({"tok_s": 23.4, "busy_ms": 7.649, "launches": 1254} | fields))


def fp16_graph(**fields: Any) -> CellRecord:
    return h100_cell("fp16", **({"tok_s": 124.8, "busy_ms": 8.007, "launches": 1462} | fields))


def fp16_compile(**fields: Any) -> CellRecord:
    facts = {"tok_s": 180.3, "busy_ms": 5.603, "launches": 370, "top": (TRITON, 2.408 / 5.603)}
    return h100_cell("fp16", "compile", **(facts | fields))


def half_b_graph() -> CellRecord:
    return fp16_graph(tok_s=389.6, busy_ms=2.662, launches=1186, costs=QWEN_HALF_B)


def half_b_compile(**fields: Any) -> CellRecord:
    facts = {"tok_s": 1170, "busy_ms": 0.858, "launches": 318, "costs": QWEN_HALF_B, "top": None}
    return fp16_compile(**(facts | fields))


def half_b_eager() -> CellRecord:
    return fp16_eager(tok_s=48, busy_ms=2.328, launches=1008, costs=QWEN_HALF_B)


def half_b_int8(copies: int = 168, **fields: Any) -> CellRecord:
    """Each of its 168 linear layers asks the GPU for its outliers, and waits for the answer."""
    facts = {"tok_s": 8, "busy_ms": 4.31, "launches": 1990, "costs": QWEN_HALF_B}
    cell = h100_cell("int8", "eager", weight_bytes=HALF_B_INT8_BYTES, **(facts | fields))
    assert cell.profile
    assert cell.profile.decode
    back = Kernel(name="Memcpy DtoH (Device -> Pageable)", count=16 * copies, total_s=0.004)
    profile = Profile(decode=msgspec.structs.replace(cell.profile.decode, kernels=[back]))
    return msgspec.structs.replace(cell, profile=profile)


def awq_graph(**fields: Any) -> CellRecord:
    facts = {"tok_s": 93, "busy_ms": 10.382, "launches": 1471, "weight_bytes": AWQ_BYTES}
    return h100_cell("awq", **(facts | {"top": ("awq_gemm_kernel", 0.71)} | fields))


def lost(precision: str, outcome: Failed | Skipped = NO_CAPTURE) -> CellRecord:
    return h100_cell(precision, tok_s=1, outcome=outcome, trials=[])


def said(*cells: CellRecord, peaks: PeaksRecord | None = H100_PEAKS) -> list[str]:
    return explanations(make_run(*cells, peaks=peaks))


def compared(one: CellRecord, baseline: CellRecord, peaks: PeaksRecord | None = H100_PEAKS) -> str | None:
    run = make_run(one, baseline, peaks=peaks)
    mine, others = decode_facts(one, run), decode_facts(baseline, run)
    assert mine
    assert others
    return comparison(mine, others)


# A cell by itself


def test_a_cell_near_the_memorys_roof() -> None:
    assert said(fp16_graph()) == [
        "fp16 graph is bandwidth-bound, drawing 60% of what the memory can deliver: 124.8 of at most "
        "207.1 tok/s"
    ]


def test_cells_alike_by_themselves_are_told_of_together() -> None:
    assert said(fp16_graph(), fp16_compile()) == [
        "fp16 graph and fp16 compile are bandwidth-bound, drawing 60% to 87% of what the memory can "
        "deliver: 124.8 to 180.3 of at most 207.1 tok/s"
    ]
    assert said(h100_cell("nf4", tok_s=145, busy_ms=6.083), fp16_compile()) == [
        "nf4 graph and fp16 compile are bandwidth-bound, drawing 70% to 87% of what the memory can deliver"
    ]


def test_a_cell_far_from_both_roofs_tells_of_its_kernels() -> None:
    assert said(half_b_compile()) == [
        "fp16 compile is kernel-bound: the GPU is busy 100% of the time with 318 kernels a token, but "
        "draws 40% of what the memory can deliver; a kernel takes 2.7 µs on average"
    ]
    assert said(awq_graph()) == [
        "awq graph is kernel-bound: the GPU is busy 97% of the time with 1,471 kernels a token, but draws "
        "14% of what the memory can deliver; a kernel takes 7.1 µs on average; `awq_gemm_kernel` takes "
        "71% of the GPU time and reads at most 21% of what the memory can deliver"
    ]
    assert said(half_b_graph(), half_b_compile()) == [
        "fp16 graph and fp16 compile are kernel-bound: the GPU is busy 100% of the time with 318 to 1,186 "
        "kernels a token, but draws 13% to 40% of what the memory can deliver"
    ]


@pytest.mark.parametrize("mode", ["graph", "compile"])
def test_an_idle_gpu_is_not_the_hosts_fault_in_a_cuda_graph(mode: DecodeMode) -> None:
    assert said(h100_cell("fp16", mode, tok_s=1170, busy_ms=0.6, launches=318, costs=QWEN_HALF_B)) == [
        f"fp16 {mode} is launch-bound within a CUDA graph: the GPU is busy 70% of the time with 318 "
        "kernels a token, and idle between them"
    ]


def test_a_large_batch_is_bound_by_arithmetic() -> None:
    (line,) = said(fp16_graph(tok_s=512 / 16e-3, busy_ms=15.5, workload={"batch_size": 512}))
    assert line.startswith("fp16 graph is compute-bound, doing ")


# The host's pace


def test_a_host_that_sets_the_pace_is_named_with_the_way_out() -> None:
    assert said(fp16_eager()) == [
        "fp16 is launch-bound: the GPU works 7.6 ms of every 42.7 ms and waits for the host, which issues "
        "1,254 kernels a token; this speed is the host's, not the precision's; try --decode graph"
    ]


def test_a_host_that_waits_for_values_is_told_so() -> None:
    assert said(half_b_int8(), lost("int8")) == [
        "int8 is launch-bound: the GPU works 4.3 ms of every 125 ms and waits for the host, which issues "
        "1,990 kernels a token and waits for 168 copies back to it; this speed is the host's, not the "
        "precision's; there is no graph of int8"
    ]
    assert "copies" not in said(half_b_int8(copies=2))[0]


def test_cells_that_wait_for_the_host_are_told_of_once() -> None:
    first, second = said(half_b_eager(), half_b_int8())
    assert first == (
        "fp16 and int8 are launch-bound: the GPU works 3% to 11% of the time and waits for the host, "
        "which issues 1,008 to 1,990 kernels a token and, for int8, waits for 168 copies back to it; "
        "these speeds and their ratios are the host's, not the precision's; try --decode graph"
    )
    assert second.startswith("int8 runs at 0.17× FP16's speed")


def test_the_way_out_is_a_row_that_the_run_has() -> None:
    nf4 = [h100_cell("nf4", mode, tok_s=40, busy_ms=6.083) for mode in ("eager", "graph")]
    assert said(fp16_eager(), fp16_graph())[0].endswith("not the precision's; see fp16 graph")
    both = said(fp16_eager(), nf4[0], fp16_graph(), nf4[1])
    assert both[0].endswith("; see fp16 graph and nf4 graph")
    one = said(fp16_eager(), half_b_int8(), fp16_graph(), lost("int8"))
    assert one[0].endswith("; see fp16 graph; there is no graph of int8")


@pytest.mark.parametrize("outcome", [NO_CAPTURE, Skipped(reason="budget")])
def test_a_graph_that_failed_or_was_left_out_is_no_way_out(outcome: Failed | Skipped) -> None:
    assert said(half_b_int8(), lost("int8", outcome))[0].endswith("; there is no graph of int8")
    assert said(half_b_int8(), lost("int8", outcome), fp16_graph())[0].endswith("; there is no graph of int8")


# A cell against FP16


def test_slower_in_gpu_time_too() -> None:
    assert compared(awq_graph(), fp16_graph()) == (
        "awq graph runs at 0.75× FP16's speed, though it reads 3.1× fewer bytes: 10.4 against 8.0 ms of "
        "GPU time a token; `awq_gemm_kernel` takes 71% of the GPU time and reads at most 21% of what the "
        "memory can deliver"
    )


def test_a_kernel_too_quick_for_all_the_bytes_bounds_nothing() -> None:
    line = compared(awq_graph(top=("quick", 0.1)), fp16_graph())
    assert line
    assert line.endswith("`quick` takes 10% of the GPU time")


def test_fewer_bytes_that_buy_little_speed() -> None:
    nf4 = h100_cell("nf4", tok_s=145, busy_ms=6.8, weight_bytes=NF4_BYTES)
    assert compared(nf4, fp16_graph()) == (
        "nf4 graph runs at 1.16× FP16's speed, though it reads 3.0× fewer bytes: 6.8 against 8.0 ms of "
        "GPU time a token"
    )


def test_fewer_bytes_that_buy_what_they_promise() -> None:
    int8 = h100_cell("int8", tok_s=210, busy_ms=4.7, weight_bytes=INT8_BYTES, top=("gemv", 0.9))
    assert compared(int8, fp16_graph()) == (
        "int8 graph runs at 1.68× FP16's speed, reading 1.9× fewer bytes: 4.7 against 8.0 ms of GPU time "
        "a token"
    )


def test_fewer_bytes_promise_nothing_where_arithmetic_is_the_bound() -> None:
    workload = {"batch_size": 512}
    fp16 = fp16_graph(tok_s=512 / 16e-3, busy_ms=15.5, workload=workload)
    line = compared(awq_graph(tok_s=512 / 15e-3, busy_ms=14.5, workload=workload), fp16)
    assert line
    assert "ms of GPU time a step; awq graph is compute-bound, doing " in line
    assert "awq_gemm" not in line


def test_more_bytes_and_as_many() -> None:
    fp32 = h100_cell("fp32", tok_s=65, busy_ms=15.2, weight_bytes=28_280_000_000)
    assert compared(fp32, fp16_graph()) == (
        "fp32 graph runs at 0.52× FP16's speed, reading 2.0× as many bytes: 15.2 against 8.0 ms of GPU "
        "time a token"
    )
    bf16 = h100_cell("bf16", tok_s=125, busy_ms=7.9)
    assert compared(bf16, fp16_graph()) == (
        "bf16 graph runs at 1.00× FP16's speed, reading as many bytes: 7.9 against 8.0 ms of GPU time a token"
    )


def test_slower_but_not_in_gpu_time() -> None:
    nf4 = h100_cell("nf4", tok_s=105, busy_ms=7.4, weight_bytes=NF4_BYTES)
    assert compared(nf4, fp16_graph()) == (
        "nf4 graph runs at 0.84× FP16's speed, though it reads 3.0× fewer bytes: 7.4 against 8.0 ms of "
        "GPU time a token, and the GPU is busy 78% of the time against 100%"
    )


def test_both_at_the_hosts_pace() -> None:
    assert compared(half_b_int8(), half_b_eager()) == (
        "int8 runs at 0.17× FP16's speed, but both wait for the host: 1,990 against 1,008 kernels a token, "
        "and the GPU is busy 3% of the time against 11%; in GPU time alone it would be 0.54×, 4.3 against "
        "2.3 ms a token"
    )


def test_one_of_two_at_the_hosts_pace() -> None:
    awq = h100_cell("awq", "eager", tok_s=28, busy_ms=10.382, launches=1479, weight_bytes=AWQ_BYTES)
    assert compared(awq, fp16_eager(tok_s=120)) == (
        "awq runs at 0.23× FP16's speed, but it waits for the host: 1,479 against 1,254 kernels a token, and "
        "the GPU is busy 29% of the time against 92%; in GPU time alone it would be 0.74×, 10.4 against 7.6 "
        "ms a token"
    )
    line = compared(h100_cell("awq", "eager", tok_s=93, busy_ms=10.382), fp16_eager())
    assert line
    assert "runs at 3.97× FP16's speed, but FP16 waits for the host: " in line


def test_gaps_in_a_cuda_graph_are_no_waiting_for_the_host() -> None:
    line = compared(awq_graph(tok_s=40, busy_ms=6.0), fp16_graph())
    assert line
    assert "awq graph runs at 0.32× FP16's speed, but it waits between kernels: " in line


def test_without_kernel_times_nothing_is_explained() -> None:
    """As on a CPU, where no kernels are traced."""
    unprofiled = Profile(reason="CUPTI is busy")
    assert compared(awq_graph(profile=unprofiled), fp16_graph()) is None
    assert compared(awq_graph(profile=None), fp16_graph(), peaks=None) is None
    assert said(fp16_graph(profile=unprofiled)) == []


@pytest.mark.parametrize("peaks", [None, NO_PEAKS])
def test_without_peaks_gpu_times_still_tell(peaks: PeaksRecord | None) -> None:
    line = compared(awq_graph(), fp16_graph(), peaks)
    assert line
    assert line.endswith(
        "10.4 against 8.0 ms of GPU time a token; `awq_gemm_kernel` takes 71% of the GPU time"
    )
    assert said(fp16_graph(), peaks=peaks) == []


def test_without_costs_bytes_are_not_mentioned() -> None:
    line = compared(awq_graph(costs=None, weight_bytes=None), fp16_graph())
    assert line
    assert "bytes" not in line


def test_a_busy_gpu_whose_other_roof_is_unknown_is_left_open_in_silence() -> None:
    outcome = Peaks(read_bytes_per_s=2.93e12, copy_bytes_per_s=3e12, matrix_flop_per_s={}, measured_s=1)
    assert said(awq_graph(), peaks=PeaksRecord(outcome=outcome, wall_s=1)) == []


# A run


def test_cells_of_old_records_say_nothing() -> None:
    assert said(make_cell("fp16"), make_cell("int8"), peaks=None) == []


def test_without_a_baseline_in_its_mode_a_cell_stands_by_itself() -> None:
    (line,) = said(lost("fp16"), fp16_graph(workload={"depth": 512}, outcome=NO_CAPTURE), awq_graph())
    assert "awq graph is kernel-bound" in line
    assert "FP16" not in line
    assert not any("awq graph runs at" in line for line in said(fp16_eager(), awq_graph()))


def test_most_important_first_and_about_one_a_cell() -> None:
    cells = [
        h100_cell("awq", "eager", tok_s=28, busy_ms=10.382, launches=1479, weight_bytes=AWQ_BYTES),
        fp16_eager(trials=[make_trial(token_ids=[1, 2, 9], decode_s=0.1)]),
        fp16_graph(),
        awq_graph(),
    ]
    lines = said(*cells)
    starts = ["awq and fp16 are", "awq graph runs", "fp16 graph is", "awq runs", "fp16 graph and eager give"]
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts


def test_workloads_are_told_apart_and_never_compared() -> None:
    cells = [fp16_graph(), awq_graph(workload={"depth": 4096}), fp16_graph(workload={"depth": 4096})]
    lines = said(*cells)
    assert [line.split(":")[0] for line in lines] == ["depth 4,096", "depth 0", "depth 4,096"]
    assert "awq graph runs at" in lines[0]
    assert not any("FP16" in line for line in said(fp16_graph(), awq_graph(workload={"batch_size": 2})))


@given(
    tok_s=st.floats(1, 3000),
    busy_ms=st.none() | st.floats(0.0, 100),
    baseline_tok_s=st.floats(1, 3000),
    baseline_busy_ms=st.none() | st.floats(0.0, 100),
    weight_bytes=st.integers(10**6, 10**11),
    peaks=st.sampled_from([None, NO_PEAKS, H100_PEAKS]),
    decode=st.sampled_from(["eager", "graph", "compile", "generate"]),
    name=st.sampled_from(["fp16", "bf16"]),
)
def test_any_figures_make_plain_sentences(
    tok_s: float,
    busy_ms: float | None,
    baseline_tok_s: float,
    baseline_busy_ms: float | None,
    weight_bytes: int,
    peaks: PeaksRecord | None,
    decode: DecodeMode,
    name: str,
) -> None:
    lines = said(
        h100_cell(name, decode, tok_s=baseline_tok_s, busy_ms=baseline_busy_ms),
        h100_cell("awq", decode, tok_s=tok_s, busy_ms=busy_ms, weight_bytes=weight_bytes, top=("gemm", 0.5)),
        peaks=peaks,
    )
    assert len(lines) <= 3
    for line in lines:
        assert not {"None", "–", "nan", "inf"} & set(line.split())
