"""The ledger balances to the byte, for any snapshot and for those of an H100."""

import json
from itertools import pairwise

import msgspec
import pytest
from click.testing import CliRunner
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from sample_records import MIB, edge, make_cell, torch_memory

from orchestrator.analysis.memory.ledger import Ledger, ledgers
from orchestrator.cli.memory import show_memory
from orchestrator.records.store import find_records, read_run
from orchestrator.report.ledger_table import bars, lines
from schemas.frames import PhaseName, TorchMemory
from schemas.record import CellRecord, PhaseEdge

PHASES: tuple[PhaseName, ...] = ("context", "load", "setup", "warmup", "prefill", "decode", "end")
RECORDED = [file.parent for folder in ("results", "tests/golden") for file in find_records(ROOT / folder)]

sizes = st.integers(0, 2**40)


@st.composite
def torch_memories(draw: st.DrawFn) -> TorchMemory:
    requested, rounding, pending, split, cache = (draw(sizes) for _ in range(5))
    allocated = requested + rounding
    active = allocated + pending
    return TorchMemory(
        requested_bytes=requested,
        allocated_bytes=allocated,
        active_bytes=active,
        inactive_split_bytes=split,
        reserved_bytes=active + split + cache,
        peak_allocated_bytes=allocated,
        peak_reserved_bytes=active + split + cache,
    )


@st.composite
def edges(draw: st.DrawFn) -> list[PhaseEdge]:
    return [
        edge(name, at_ns, torch=draw(st.none() | torch_memories()), process=draw(st.none() | sizes))
        for at_ns, name in enumerate(PHASES)
    ]


@given(edges())
def test_terms_add_up_to_nvmls_figure(seen: list[PhaseEdge]) -> None:
    found = ledgers(make_cell(edges=seen))
    ends = {
        start.phase.name: end
        for start, end in pairwise(seen)
        if end.phase.torch and end.reading and end.reading.process_bytes is not None
    }
    assert list(found) == list(ends)
    for phase, ledger in found.items():
        end = ends[phase]
        assert end.phase.torch
        assert end.reading
        assert ledger.residual_bytes == 0
        assert ledger.process_bytes == end.reading.process_bytes
        assert ledger.reserved_bytes == end.phase.torch.reserved_bytes


@pytest.mark.parametrize("folder", RECORDED, ids=lambda folder: folder.name)
def test_recorded_runs_balance_and_little_is_unexplained(folder: object) -> None:
    run = read_run(folder)  # type: ignore[arg-type]
    books = [(cell.precision, ledgers(cell)) for cell in run.cells]
    assert any(book for _, book in books)
    for precision, book in books:
        for ledger in book.values():
            assert ledger.residual_bytes == 0
            assert min(term for line in lines([ledger]) for term in line.bytes_ if term is not None) >= 0
        if "decode" in book:
            # gemlite, which hqq imports, adds to the context.
            context_mib = 610 if precision == "hqq" else 518
            assert book["decode"].outside_bytes["context"] == context_mib * MIB
            assert book["decode"].outside_bytes["rest"] <= 16 * MIB, precision


def cell(*process_bytes: int | None) -> CellRecord:
    """A cell whose torch memory is empty, so all memory is outside torch."""
    nothing = TorchMemory(
        requested_bytes=0,
        allocated_bytes=0,
        active_bytes=0,
        inactive_split_bytes=0,
        reserved_bytes=0,
        peak_allocated_bytes=0,
        peak_reserved_bytes=0,
    )
    names = PHASES[: len(process_bytes)]
    return make_cell(
        edges=[
            edge(name, at, torch=nothing, process=held)
            for at, (name, held) in enumerate(zip(names, process_bytes, strict=True))
        ]
    )


def test_memory_outside_torch_is_split_by_phase() -> None:
    book = ledgers(cell(None, 500, 600, 600, 670, 671, 680))
    assert book["context"].outside_bytes == {"context": 500}
    assert book["load"].outside_bytes == {"context": 500, "load": 100}
    decode = {"context": 500, "load": 100, "setup": 0, "warmup": 70, "rest": 10}
    assert book["decode"].outside_bytes == decode
    assert book["prefill"].outside_bytes == decode | {"rest": 1}


def test_torch_memory_outside_the_model_is_listed_separately() -> None:
    def held(allocated: int, pools: int) -> TorchMemory:
        return msgspec.structs.replace(
            torch_memory(allocated), private_pool_bytes=pools, expandable_bytes=allocated
        )

    seen = [
        edge("context", 0),
        edge("load", 1, torch=held(0, 0), process=500),
        edge("cublas", 2, torch=held(1000, 0), process=1600),
        edge("setup", 3, torch=held(1032, 0), process=1696),
        edge("decode", 4, torch=held(1100, 60), process=1764),
        edge("end", 5, torch=held(1100, 60), process=1764),
    ]
    book = ledgers(make_cell(edges=seen))
    assert book["load"].cublas_workspace_bytes is None
    decode = book["decode"]
    assert decode.outside_bytes == {"context": 500, "load": 100, "cublas": 64, "setup": 0, "rest": 0}
    assert (decode.cublas_workspace_bytes, decode.private_pool_bytes, decode.expandable_bytes) == (
        32,
        60,
        1100,
    )
    shown = {line.heading: line.bytes_ for line in lines([decode, book["context"]])}
    assert shown["  of which: cuBLAS workspace"] == [32, None]
    assert shown["  of which: CUDA graph pools"] == [60, 0]
    assert shown["outside: added by cuBLAS"] == [64, None]


def test_released_memory_is_negative() -> None:
    assert ledgers(cell(None, 500, 480))["load"].outside_bytes == {"context": 500, "load": -20}


def test_without_nvml_or_torch_there_is_no_ledger() -> None:
    hidden = ledgers(cell(None, None, 600, None))
    assert list(hidden) == ["load"]
    assert hidden["load"].outside_bytes == {"load": 600}
    assert ledgers(make_cell(edges=[edge("load", 0, process=5), edge("warmup", 1, process=6)])) == {}


def test_bars_share_one_scale() -> None:
    def ledger(tensors: int, process: int) -> Ledger:
        return Ledger(
            phase="decode",
            requested_bytes=tensors,
            rounding_bytes=0,
            pending_free_bytes=0,
            split_fragment_bytes=0,
            releasable_bytes=0,
            outside_bytes={"context": process - tensors},
            process_bytes=process,
        )

    long, short, _ = bars({"fp16": ledger(50 * MIB, 60 * MIB), "awq": ledger(10 * MIB, 30 * MIB)})
    assert (long.count("█"), long.count("░")) == (50, 10)
    assert (short.count("█"), short.count("░")) == (10, 20)
    assert long.endswith(" 60.0")


def test_the_command_prints_the_ledger_of_a_phase() -> None:
    folder = str(ROOT / "tests/golden/h100-precisions-7b")
    shown = (
        CliRunner().invoke(show_memory, [folder, "-p", "int8", "-p", "fp16"], standalone_mode=False).output
    )
    assert shown.startswith("MiB at the end of decode")
    rows = {
        line.strip().split("  ")[0]: line.split()[-3:] for line in shown.splitlines()[:20] if line.strip()
    }
    assert rows["split fragments"] == ["1.6", "8.1", "302.3"]
    assert rows["= process, by NVML"] == ["15,266.0", "15,392.0", "9,392.0"]
    assert rows["residual"] == ["0.0", "0.0", "0.0"]
    output = CliRunner().invoke(show_memory, [folder, "--json"], standalone_mode=False).output
    summary = json.loads(output)
    assert summary["ledgers"]["fp16"]["load"]["outside_bytes"] == {"context": 518 * MIB, "load": 92 * MIB}
    at_load = CliRunner().invoke(show_memory, [folder, "--phase", "load"], standalone_mode=False).output
    assert at_load.startswith("MiB at the end of load")
    assert "int8 graph" in at_load.splitlines()[2]
