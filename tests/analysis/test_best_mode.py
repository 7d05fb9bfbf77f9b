"""Best mode vs best mode: each precision's speed-up, and the batch size up to which it leads."""

import msgspec
import pytest
from analyses import rows_of
from conftest import ROOT
from golden_text import Golden

from orchestrator.analysis.best_mode import Best, best_modes, leads
from orchestrator.analysis.metrics import CellMetrics
from orchestrator.records.store import read_run
from orchestrator.report.best_table import best_table
from orchestrator.report.summary import as_json, as_markdown


def row(precision: str, tok_s: float | None, decode: str = "graph", **fields: object) -> CellMetrics:
    return CellMetrics(
        precision=precision, label="", bits_per_weight=4, decode=decode, decode_tok_s=tok_s, **fields
    )  # type: ignore[arg-type]


def at_batches(precision: str, tok_s: dict[int, float]) -> list[CellMetrics]:
    return [row(precision, speed, batch_size=size) for size, speed in tok_s.items()]


def test_each_precision_is_shown_in_its_best_mode() -> None:
    rows = [
        row("fp16", 40, "eager"), row("fp16", 130), row("fp16", 180, "compile"),
        row("awq-marlin", 30, "eager"), row("awq-marlin", 270), row("awq-marlin", None, "compile"),
    ]  # fmt: skip
    fp16, marlin = best_modes(rows)
    assert (fp16.decode, fp16.versus_baseline) == ("compile", 1.0)
    assert (marlin.decode, marlin.baseline_decode, marlin.versus_baseline) == ("graph", "compile", 1.5)
    assert best_table([fp16, marlin]) == [
        ["best mode", "vs FP16's best"],
        ["fp16", "180.0 tok/s, compile"],
        ["awq-marlin", "1.50×, graph"],
    ]


def test_batches_are_compared_with_fp16_at_the_same_batch() -> None:
    rows = at_batches("fp16", {1: 100, 8: 800}) + at_batches("nf4", {1: 150, 8: 400})
    assert [best.versus_baseline for best in best_modes(rows)] == [1.0, 1.0, 1.5, 0.5]
    assert best_table(best_modes(rows))[0] == ["best mode", "batch 1", "batch 8"]


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ({1: 180, 4: 480, 16: 1500}, "leads up to 4 (1.20×) and loses its lead at 16 (0.94×)"),
        (
            {1: 180, 4: 390, 16: 1500},
            "1.80× FP16's speed at batch 1 and loses its lead at 4 (0.97×)",
        ),
        ({1: 180, 4: 480, 16: 1760}, "and still leads at 16 (1.10×)"),
        ({1: 80, 4: 480}, None),
        ({1: 180}, None),
    ],
)
def test_the_batch_at_which_a_lead_is_lost(
    speeds: dict[int, float], expected: str | None, golden: Golden
) -> None:
    rows = at_batches("fp16", {1: 100, 4: 400, 16: 1600}) + at_batches("int4-wo", speeds)
    lines = list(leads(best_modes(rows)))
    golden(lines)
    assert [expected in line for line in lines] == ([] if expected is None else [True])


def test_a_ratio_of_hosts_is_not_a_lead() -> None:
    rows = [
        msgspec.structs.replace(each, decode="eager", decode_bound="launch")
        for each in at_batches("fp16", {1: 40, 4: 160}) + at_batches("int8", {1: 60, 4: 100})
    ]
    assert list(leads(best_modes(rows))) == []
    assert best_table(best_modes(rows))[2] == ["int8", "(1.50×), eager", "(0.62×), eager"]


@pytest.mark.parametrize(
    "rows",
    [
        [row("fp16", 40, "eager"), row("int8", 30, "eager")],
        [row("fp16", 40, "graph")],
        [row("awq", 40, "graph"), row("int8", 30, "graph")],
        [],
    ],
    ids=["eager only", "one precision", "no fp16", "nothing"],
)
def test_without_a_choice_there_is_no_table(rows: list[CellMetrics]) -> None:
    assert best_table(best_modes(rows)) == []


def test_every_form_of_the_report_includes_it() -> None:
    run = read_run(ROOT / "tests/golden/h100-precisions-7b")
    assert "| awq | 0.76×, graph |" in as_markdown(run)
    expected = msgspec.json.decode(as_json(run))["best"]
    assert msgspec.convert(expected, list[Best]) == best_modes(rows_of(run))
