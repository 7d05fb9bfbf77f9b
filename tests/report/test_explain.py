"""Sentences below the table, on figures from an H100; without figures there are none.

The sentences are golden texts; the tests assert which cells they name, and their figures.
"""

from typing import Any

import msgspec
import pytest
from golden_text import Golden
from hypothesis import given
from hypothesis import strategies as st
from sample_records import H100_PEAKS, QWEN_HALF_B, h100_cell, make_cell, make_run, make_trial

from orchestrator.analysis.metrics import analyze_cell
from orchestrator.analysis.run_analysis import analyze_run
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
    """Each of its 168 linear layers copies outliers from the GPU, and waits for the copy."""
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


def failed(precision: str, outcome: Failed | Skipped = NO_CAPTURE) -> CellRecord:
    return h100_cell(precision, tok_s=1, outcome=outcome, trials=[])


def explained(*cells: CellRecord, peaks: PeaksRecord | None = H100_PEAKS) -> list[str]:
    return explanations(analyze_run(make_run(*cells, peaks=peaks)))


def compared(one: CellRecord, baseline: CellRecord, peaks: PeaksRecord | None = H100_PEAKS) -> str | None:
    mine, others = (decode_facts(analyze_cell(cell, peaks)) for cell in (one, baseline))
    assert mine
    assert others
    return comparison(mine, others)


def assert_says(line: str | None, *facts: str) -> None:
    assert line
    assert [fact for fact in facts if fact not in line] == []


# A single cell


def test_a_cell_near_the_memory_roof(golden: Golden) -> None:
    lines = explained(fp16_graph())
    golden(lines)
    (line,) = lines
    assert_says(line, "fp16 graph is bandwidth-bound", "60%", "124.8", "207.1 tok/s")


def test_cells_with_the_same_limit_share_a_sentence(golden: Golden) -> None:
    lines = explained(fp16_graph(), fp16_compile())
    golden(lines)
    (line,) = lines
    assert_says(line, "fp16 graph and fp16 compile are bandwidth-bound", "60% to 87%")
    assert_says(line, "124.8 to 180.3", "207.1 tok/s")
    lines = explained(h100_cell("nf4", tok_s=145, busy_ms=6.083), fp16_compile())
    golden(lines)
    (line,) = lines
    assert_says(line, "nf4 graph and fp16 compile are bandwidth-bound", "70% to 87%")
    assert "tok/s" not in line  # their roofs differ


def test_a_cell_far_from_both_roofs_is_explained_by_its_kernels(golden: Golden) -> None:
    lines = explained(half_b_compile())
    golden(lines)
    (line,) = lines
    assert_says(line, "fp16 compile is kernel-bound", "100%", "318 kernels", "40%", "2.7 µs")
    lines = explained(awq_graph())
    golden(lines)
    (line,) = lines
    assert_says(line, "awq graph is kernel-bound", "97%", "1,471 kernels", "14%", "7.1 µs")
    assert_says(line, "`awq_gemm_kernel` takes 71%", "21%")
    lines = explained(half_b_graph(), half_b_compile())
    golden(lines)
    (line,) = lines
    assert_says(line, "fp16 graph and fp16 compile are kernel-bound", "318 to 1,186 kernels", "13% to 40%")


@pytest.mark.parametrize("mode", ["graph", "compile"])
def test_in_a_cuda_graph_an_idle_gpu_is_not_due_to_the_host(mode: DecodeMode, golden: Golden) -> None:
    lines = explained(h100_cell("fp16", mode, tok_s=1170, busy_ms=0.6, launches=318, costs=QWEN_HALF_B))
    golden(lines)
    (line,) = lines
    assert_says(line, f"fp16 {mode} is launch-bound", "CUDA graph", "70%", "318 kernels")
    assert "host" not in line


def test_a_large_batch_is_bound_by_arithmetic(golden: Golden) -> None:
    lines = explained(fp16_graph(tok_s=512 / 16e-3, busy_ms=15.5, workload={"batch_size": 512}))
    golden(lines)
    (line,) = lines
    assert_says(line, "fp16 graph is compute-bound")


# The host


def test_a_cell_limited_by_the_host_comes_with_the_remedy(golden: Golden) -> None:
    lines = explained(fp16_eager())
    golden(lines)
    (line,) = lines
    assert_says(line, "fp16 is launch-bound", "7.6 ms", "42.7 ms", "1,254 kernels", "--decode graph")


def test_a_host_that_waits_for_copies_is_reported(golden: Golden) -> None:
    lines = explained(half_b_int8(), failed("int8"))
    golden(lines)
    (line,) = lines
    assert_says(line, "int8 is launch-bound", "4.3 ms", "125 ms", "1,990 kernels", "168 copies")
    assert "copies" not in explained(half_b_int8(copies=2))[0]


def test_cells_limited_by_the_host_share_a_sentence(golden: Golden) -> None:
    lines = explained(half_b_eager(), half_b_int8())
    golden(lines)
    first, second = lines
    assert_says(first, "fp16 and int8 are launch-bound", "3% to 11%", "1,008 to 1,990 kernels")
    assert_says(first, "int8, waits for 168 copies", "--decode graph")
    assert second.startswith("int8 runs at 0.17× FP16's speed")


def test_the_remedy_is_a_row_of_the_run(golden: Golden) -> None:
    nf4 = [h100_cell("nf4", mode, tok_s=40, busy_ms=6.083) for mode in ("eager", "graph")]
    one = explained(fp16_eager(), fp16_graph())[0]
    both = explained(fp16_eager(), nf4[0], fp16_graph(), nf4[1])[0]
    partly = explained(fp16_eager(), half_b_int8(), fp16_graph(), failed("int8"))[0]
    golden([one, both, partly])
    assert one.endswith("; see fp16 graph")
    assert both.endswith("; see fp16 graph and nf4 graph")
    assert_says(partly, "; see fp16 graph;")
    assert partly.endswith("int8")
    assert "--decode" not in one + both + partly


@pytest.mark.parametrize("outcome", [NO_CAPTURE, Skipped(reason="budget")], ids=["failed", "skipped"])
def test_a_graph_row_without_figures_is_no_remedy(outcome: Failed | Skipped, golden: Golden) -> None:
    single = explained(half_b_int8(), failed("int8", outcome))[0]
    with_fp16 = explained(half_b_int8(), failed("int8", outcome), fp16_graph())[0]
    golden([single, with_fp16])
    assert "see " not in single + with_fp16


# A cell compared with FP16


def test_slower_in_gpu_time_as_well(golden: Golden) -> None:
    line = compared(awq_graph(), fp16_graph())
    assert line
    golden(line)
    assert_says(line, "awq graph runs at 0.75×", "3.1× fewer bytes", "10.4", "8.0 ms")
    assert_says(line, "`awq_gemm_kernel` takes 71%", "21%")


def test_a_kernel_too_fast_for_all_the_bytes_has_no_bandwidth_limit(golden: Golden) -> None:
    line = compared(awq_graph(top=("quick", 0.1)), fp16_graph())
    assert line
    golden(line)
    assert line.endswith("`quick` takes 10% of the GPU time")


def test_fewer_bytes_with_little_speed_up(golden: Golden) -> None:
    nf4 = h100_cell("nf4", tok_s=145, busy_ms=6.8, weight_bytes=NF4_BYTES)
    line = compared(nf4, fp16_graph())
    assert line
    golden(line)
    assert_says(line, "nf4 graph runs at 1.16×", "though", "3.0× fewer bytes", "6.8", "8.0 ms")


def test_fewer_bytes_with_the_speed_up_that_they_promise(golden: Golden) -> None:
    int8 = h100_cell("int8", tok_s=210, busy_ms=4.7, weight_bytes=INT8_BYTES, top=("gemv", 0.9))
    line = compared(int8, fp16_graph())
    assert line
    golden(line)
    assert_says(line, "int8 graph runs at 1.68×", "1.9× fewer bytes", "4.7", "8.0 ms")
    assert "though" not in line
    assert "gemv" not in line


def test_fewer_bytes_promise_nothing_if_arithmetic_is_the_limit(golden: Golden) -> None:
    workload = {"batch_size": 512}
    fp16 = fp16_graph(tok_s=512 / 16e-3, busy_ms=15.5, workload=workload)
    line = compared(awq_graph(tok_s=512 / 15e-3, busy_ms=14.5, workload=workload), fp16)
    assert line
    golden(line)
    assert_says(line, "GPU time per step", "awq graph is compute-bound")
    assert "awq_gemm" not in line


def test_more_bytes_or_the_same(golden: Golden) -> None:
    more = compared(h100_cell("fp32", tok_s=65, busy_ms=15.2, weight_bytes=28_280_000_000), fp16_graph())
    same = compared(h100_cell("bf16", tok_s=125, busy_ms=7.9), fp16_graph())
    assert more
    assert same
    golden([more, same])
    assert_says(more, "fp32 graph runs at 0.52×", "2.0× as many bytes", "15.2", "8.0 ms")
    assert_says(same, "bf16 graph runs at 1.00×", "7.9", "8.0 ms")


def test_slower_but_not_in_gpu_time(golden: Golden) -> None:
    nf4 = h100_cell("nf4", tok_s=105, busy_ms=7.4, weight_bytes=NF4_BYTES)
    line = compared(nf4, fp16_graph())
    assert line
    golden(line)
    assert_says(line, "nf4 graph runs at 0.84×", "3.0× fewer bytes", "7.4", "8.0 ms", "78%", "100%")


def test_both_limited_by_the_host(golden: Golden) -> None:
    line = compared(half_b_int8(), half_b_eager())
    assert line
    golden(line)
    assert_says(line, "int8 runs at 0.17×", "both wait for the host", "1,990", "1,008 kernels")
    assert_says(line, "3%", "11%", "0.54×", "4.3", "2.3 ms")


def test_one_of_two_limited_by_the_host(golden: Golden) -> None:
    awq = h100_cell("awq", "eager", tok_s=28, busy_ms=10.382, launches=1479, weight_bytes=AWQ_BYTES)
    slower = compared(awq, fp16_eager(tok_s=120))
    faster = compared(h100_cell("awq", "eager", tok_s=93, busy_ms=10.382), fp16_eager())
    assert slower
    assert faster
    golden([slower, faster])
    assert_says(slower, "awq runs at 0.23×", "it waits for the host", "1,479", "1,254 kernels")
    assert_says(slower, "29%", "92%", "0.74×", "10.4", "7.6 ms")
    assert_says(faster, "runs at 3.97×", "FP16 waits for the host")


def test_gaps_in_a_cuda_graph_are_not_due_to_the_host(golden: Golden) -> None:
    line = compared(awq_graph(tok_s=40, busy_ms=6.0), fp16_graph())
    assert line
    golden(line)
    assert_says(line, "awq graph runs at 0.32×", "it waits between kernels")


def test_without_kernel_times_nothing_is_explained() -> None:
    """As on a CPU, where no kernels are traced."""
    unprofiled = Profile(reason="CUPTI is busy")
    assert compared(awq_graph(profile=unprofiled), fp16_graph()) is None
    assert compared(awq_graph(profile=None), fp16_graph(), peaks=None) is None
    assert explained(fp16_graph(profile=unprofiled)) == []


@pytest.mark.parametrize("peaks", [None, NO_PEAKS], ids=["none", "failed"])
def test_without_peaks_gpu_times_still_explain(peaks: PeaksRecord | None, golden: Golden) -> None:
    line = compared(awq_graph(), fp16_graph(), peaks)
    assert line
    golden(line)
    assert_says(line, "10.4", "8.0 ms")
    assert line.endswith("`awq_gemm_kernel` takes 71% of the GPU time")
    assert explained(fp16_graph(), peaks=peaks) == []


def test_without_costs_bytes_are_not_mentioned() -> None:
    line = compared(awq_graph(costs=None, weight_bytes=None), fp16_graph())
    assert line
    assert "bytes" not in line


def test_a_busy_gpu_with_an_unknown_roof_has_no_sentence() -> None:
    outcome = Peaks(read_bytes_per_s=2.93e12, copy_bytes_per_s=3e12, matrix_flop_per_s={}, measured_s=1)
    assert explained(awq_graph(), peaks=PeaksRecord(outcome=outcome, wall_s=1)) == []


# A run


def test_cells_of_old_records_have_no_sentences() -> None:
    assert explained(make_cell("fp16"), make_cell("int8"), peaks=None) == []


def test_without_a_baseline_in_its_mode_a_cell_is_explained_on_its_own() -> None:
    (line,) = explained(failed("fp16"), fp16_graph(workload={"depth": 512}, outcome=NO_CAPTURE), awq_graph())
    assert "awq graph is kernel-bound" in line
    assert "FP16" not in line
    assert not any("awq graph runs at" in line for line in explained(fp16_eager(), awq_graph()))


def test_the_most_important_comes_first() -> None:
    cells = [
        h100_cell("awq", "eager", tok_s=28, busy_ms=10.382, launches=1479, weight_bytes=AWQ_BYTES),
        fp16_eager(trials=[make_trial(token_ids=[1, 2, 9], decode_s=0.1)]),
        fp16_graph(),
        awq_graph(),
    ]
    lines = explained(*cells)
    starts = ["awq and fp16 are", "awq graph runs", "fp16 graph is", "awq runs", "fp16 graph and eager give"]
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts


def test_workloads_are_distinguished_and_never_compared() -> None:
    cells = [fp16_graph(), awq_graph(workload={"depth": 4096}), fp16_graph(workload={"depth": 4096})]
    lines = explained(*cells)
    assert [line.split(":")[0] for line in lines] == ["depth 4,096", "depth 0", "depth 4,096"]
    assert "awq graph runs at" in lines[0]
    assert not any("FP16" in line for line in explained(fp16_graph(), awq_graph(workload={"batch_size": 2})))


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
def test_no_figures_make_a_broken_sentence(
    tok_s: float,
    busy_ms: float | None,
    baseline_tok_s: float,
    baseline_busy_ms: float | None,
    weight_bytes: int,
    peaks: PeaksRecord | None,
    decode: DecodeMode,
    name: str,
) -> None:
    lines = explained(
        h100_cell(name, decode, tok_s=baseline_tok_s, busy_ms=baseline_busy_ms),
        h100_cell("awq", decode, tok_s=tok_s, busy_ms=busy_ms, weight_bytes=weight_bytes, top=("gemm", 0.5)),
        peaks=peaks,
    )
    assert len(lines) <= 3
    for line in lines:
        assert not {"None", "–", "nan", "inf"} & set(line.split())
