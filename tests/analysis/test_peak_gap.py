"""Why NVML's peak differs from torch's: terms that add up to the difference."""

import pytest
from analyses import cell_memory_of
from conftest import ROOT
from golden_text import Golden
from sample_records import MIB, edge, make_cell, make_ready, sample, torch_memory

from orchestrator.analysis.memory.peak_gap import gap_sentence
from orchestrator.records.store import read_run
from schemas.frames import TorchMemory
from schemas.record import CellRecord, PhaseEdge


def edges(reserved_at_peak: int = 130) -> list[PhaseEdge]:
    """In MiB: decode ends with 100 allocated of 120 reserved, at most 110 of `reserved_at_peak` before."""
    torch = torch_memory(100 * MIB, reserved=120 * MIB, peak=110 * MIB)
    at_end = TorchMemory(
        **{
            **{name: getattr(torch, name) for name in torch.__struct_fields__},
            "peak_reserved_bytes": reserved_at_peak * MIB,
        }
    )
    return [
        edge("load", 0),
        edge("decode", 10**9, torch=torch_memory(90 * MIB), process=300 * MIB, device=310 * MIB),
        edge("profile", 3 * 10**9, torch=at_end, process=620 * MIB, device=625 * MIB),
        edge("end", 4 * 10**9, torch=torch, process=900 * MIB, device=900 * MIB),
    ]


def test_the_terms_add_up_to_the_highest_sample(golden: Golden) -> None:
    gap = cell_memory_of(make_cell(edges=edges(), samples=[sample(2 * 10**9, device=640 * MIB)])).gap
    assert gap
    assert (gap.phase, gap.seen_at_s, gap.device_bytes) == ("decode", 2.0, 640 * MIB)
    parts = (gap.torch_bytes, gap.kept_bytes, gap.outside_bytes, gap.others_bytes)
    assert parts == (110 * MIB, 20 * MIB, 500 * MIB, 10 * MIB)
    assert sum(parts) == gap.device_bytes
    golden(gap_sentence(gap, 0.1))


def test_memory_missed_between_samples_is_reported(golden: Golden) -> None:
    gap = cell_memory_of(make_cell(edges=edges(reserved_at_peak=200))).gap
    assert gap
    assert gap.others_bytes == -75 * MIB
    sentence = gap_sentence(gap, 0.1)
    golden(sentence)
    assert " 75 " in sentence
    assert "0.10 s apart" in sentence


@pytest.mark.parametrize(
    "cell",
    [
        make_cell(edges=edges(), ready=make_ready(uuid=None)),
        make_cell(edges=edges()[:2]),
        make_cell(edges=[edge("load", 0), edge("decode", 1, device=5), edge("end", 2, device=5)]),
    ],
    ids=["cpu", "ended while loading", "torch unknown"],
)
def test_without_both_peaks_there_is_no_gap(cell: CellRecord) -> None:
    assert cell_memory_of(cell).gap is None


def test_on_an_h100_only_the_drivers_memory_is_unexplained() -> None:
    for cell in read_run(ROOT / "tests/golden/h100-precisions-7b").cells:
        gap = cell_memory_of(cell).gap
        if gap:
            assert gap.phase != "profile"
            assert 0 <= gap.others_bytes <= 16 * MIB
