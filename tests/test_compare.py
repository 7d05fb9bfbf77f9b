"""Two runs held against each other: matched by what was measured, and a gate that fails beyond the noise."""

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result
from conftest import ROOT
from records import DONE, H100, T4, make_cell, make_job, make_run, make_trial

from orchestrator.compare import Pair, compare_runs, parse_limit
from orchestrator.compare_cli import Comparisons, compare
from orchestrator.errors import BadInput
from orchestrator.gpu_speedups import gpu_speedups
from orchestrator.store import RunFolder, read_run
from schemas.frames import Failed
from schemas.job import ModelSource, Workload
from schemas.record import CellRecord, Run

RESULTS = ROOT / "results"


def cell(precision: str, tok_s: float, round_: int = 0, **workload: object) -> CellRecord:
    load = Workload(**({"prompts": ["one"], "new_tokens": 5} | workload))  # type: ignore[arg-type]
    trial = make_trial(decode_s=4 / tok_s, token_s=[1 / tok_s] * 4, prefill_s=1 / tok_s)
    job = make_job(precision, workload=load, round=round_)
    return make_cell(precision, job=job, trials=[trial], outcome=DONE)


def rounds(tok_s: float, noise: float = 0.002) -> Run:
    """FP16 in seven rounds around this speed."""
    return make_run(*(cell("fp16", tok_s * (1 + noise * (at - 3)), at) for at in range(7)))


def pair(found: list[Pair], figure: str) -> Pair:
    (one,) = [each for each in found if each.figure == figure]
    return one


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(compare, list(map(str, arguments)), standalone_mode=False)


def keep(run: Run, folder: Path) -> Path:
    kept = RunFolder.create(folder, run.plan, run.environment)
    for each in run.cells:
        kept.append(each)
    return folder


def test_a_difference_over_rounds_has_an_interval_and_a_verdict() -> None:
    decode = pair(compare_runs(rounds(100), rounds(110)).pairs, "decode").comparison
    assert decode.ratio == pytest.approx(1.1, rel=0.001)
    assert decode.verdict == "faster"
    assert (decode.low or 0) < 1.1 < (decode.high or 0)
    ttft = pair(compare_runs(rounds(100), rounds(110)).pairs, "ttft").comparison
    assert ttft.ratio == pytest.approx(1 / 1.1, rel=0.001)
    assert pair(compare_runs(rounds(100), rounds(100.1)).pairs, "decode").comparison.verdict == "same"


def test_runs_of_one_round_have_a_ratio_alone() -> None:
    decode = pair(compare_runs(make_run(cell("fp16", 100)), make_run(cell("fp16", 50))).pairs, "decode")
    assert (decode.reference, decode.value) == pytest.approx((100, 50))
    assert decode.comparison.ratio == pytest.approx(0.5)
    assert decode.comparison.verdict is None


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (cell("int8", 100), "fp16 eager: is not in the second run"),
        (cell("fp16", 100, batch_size=4), "batch size 4, not 1"),
        (cell("fp16", 100, new_tokens=9), "new tokens 9, not 5"),
        (cell("fp16", 100, prompts=["two"]), "prompts "),
        (
            msgspec.structs.replace(
                cell("fp16", 1),
                job=make_job(
                    "fp16",
                    model=ModelSource(kind="folder", location="m", name="large"),
                    workload=Workload(prompts=["one"], new_tokens=5),
                ),
            ),
            "model large, not tiny",
        ),
    ],
)
def test_what_cannot_be_compared_is_told_with_its_reason(other: CellRecord, why: str) -> None:
    found = compare_runs(make_run(cell("fp16", 100)), make_run(other))
    assert found.pairs == []
    assert len(found.unmatched) == 2
    assert why in found.unmatched[0]


def test_a_cell_that_failed_in_one_run_is_told() -> None:
    lost = make_cell("fp16", job=make_job(workload=Workload(prompts=["one"], new_tokens=5)), trials=[])
    lost = msgspec.structs.replace(lost, outcome=Failed(kind="out-of-memory", message="no room"))
    found = compare_runs(make_run(cell("fp16", 100)), make_run(lost))
    assert found.pairs == []
    assert found.unmatched == ["fp16 eager: has no figures in the second run: out-of-memory: no room"]


def test_what_else_differs_is_told() -> None:
    one, other = make_run(cell("fp16", 100)), make_run(cell("fp16", 100))
    machine = msgspec.structs.replace(other.environment, commit="beef", driver="600.1")
    other = msgspec.structs.replace(other, environment=machine)
    told = compare_runs(one, other).differences
    assert any(line.startswith("commit: ") and line.endswith("against beef") for line in told)
    assert any(line.startswith("driver: ") for line in told)


@pytest.mark.parametrize(
    ("limit", "tok_s", "status"),
    [
        ("decode<0.95", 90, 1),
        ("decode < 0.95", 94.9, 0),  # the interval reaches beyond the limit
        ("decode<0.95", 100, 0),
        ("decode>1.02", 110, 1),
        ("ttft>1.05", 90, 1),
    ],
)
def test_a_limit_is_broken_beyond_the_noise_only(
    tmp_path: Path, limit: str, tok_s: float, status: int
) -> None:
    first, second = keep(rounds(100), tmp_path / "a"), keep(rounds(tok_s), tmp_path / "b")
    result = invoke(first, second, "--fail-if", limit)
    assert result.return_value == status
    assert (f"breaks {limit}" in result.stderr) == bool(status)


def test_one_round_breaks_no_limit_of_speed_but_says_that_it_may(tmp_path: Path) -> None:
    first = keep(make_run(cell("fp16", 100)), tmp_path / "a")
    second = keep(make_run(cell("fp16", 50)), tmp_path / "b")
    result = invoke(first, second, "--fail-if", "decode<0.95")
    assert result.return_value == 0
    assert "may break decode<0.95: one round can't tell" in result.stderr


def test_memory_needs_no_rounds() -> None:
    result = invoke(RESULTS / "h100-modes/7b", RESULTS / "h100-modes/7b", "--fail-if", "peak>0.99")
    assert result.return_value == 1
    assert "fp16 graph: peak 1.00× breaks peak>0.99" in result.stderr


@pytest.mark.parametrize("text", ["decode", "decode<", "speed<0.9", "decode=1", "decode<x"])
def test_a_limit_that_is_none(text: str) -> None:
    with pytest.raises(BadInput, match="is no limit"):
        parse_limit(text)


def test_recorded_runs_of_an_h100() -> None:
    result = invoke(RESULTS / "h100-modes/7b-prompts", RESULTS / "h100-long-prompts")
    assert result.return_value == 0
    row = next(line for line in result.stdout.splitlines() if "2048" in line and "decode, tok/s" in line)
    assert row.split()[-7:] == ["98.8", "126.4", "1.28×", "one", "round:", "no", "interval"]
    assert "commit: 541be5341570 against 8ed3b44627bb" in result.stdout
    told = invoke(RESULTS / "h100-modes/7b-prompts", RESULTS / "h100-long-prompts", "--json").stdout
    assert len(msgspec.json.decode(told, type=Comparisons).runs) == 1


def test_gpus_side_by_side() -> None:
    run = read_run(RESULTS / "h100-precisions-7b")
    (row,) = gpu_speedups([run])
    assert row.tensor_cores == ["INT8", "FP8"]
    assert row.best["awq"].versus_baseline == pytest.approx(0.757, abs=0.001)
    assert "NVIDIA H100 80GB HBM3  INT8, FP8" in invoke(RESULTS / "h100-precisions-7b").stdout
    assert gpu_speedups([make_run()]) == []


@pytest.mark.parametrize(("gpu", "has"), [(H100, ["INT8", "FP8"]), (T4, ["INT8", "INT4"])])
def test_what_tensor_cores_multiply(gpu: object, has: list[str]) -> None:
    run = make_run(cell("fp16", 100))
    ready = msgspec.structs.replace(run.cells[0].ready, device_uuid=gpu.uuid)  # type: ignore[attr-defined]
    run = make_run(msgspec.structs.replace(run.cells[0], ready=ready))
    machine = msgspec.structs.replace(run.environment, gpus=[gpu])
    run = msgspec.structs.replace(run, environment=machine)
    assert gpu_speedups([run])[0].tensor_cores == has
