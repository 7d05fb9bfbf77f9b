"""Comparing two runs: cells are matched by their settings, and a gate fails beyond the noise."""

import gzip
import json
import shutil
from pathlib import Path

import msgspec
import pytest
from analyses import comparison_of
from click.testing import CliRunner, Result
from conftest import ROOT
from golden_text import Golden
from sample_records import DONE, H100, T4, make_cell, make_job, make_run, make_trial

from orchestrator.analysis.comparison.compare import Pair
from orchestrator.analysis.comparison.gpu_speedups import gpu_speedups
from orchestrator.analysis.comparison.limits import parse_limit
from orchestrator.analysis.comparison.measured_run import measure_run
from orchestrator.cli.compare import Comparisons, compare
from orchestrator.errors import BadInput
from orchestrator.records.store import RunFolder, read_run
from schemas.frames import Failed
from schemas.job import ModelSource, Workload
from schemas.record import CellRecord, Run

RECORDED = ROOT / "tests/golden"
GOLDEN = ROOT / "tests" / "golden" / "h100-random-0.5b"


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
    decode = pair(comparison_of(rounds(100), rounds(110)).pairs, "decode").comparison
    assert decode.ratio == pytest.approx(1.1, rel=0.001)
    assert decode.verdict == "faster"
    assert (decode.low or 0) < 1.1 < (decode.high or 0)
    ttft = pair(comparison_of(rounds(100), rounds(110)).pairs, "ttft").comparison
    assert ttft.ratio == pytest.approx(1 / 1.1, rel=0.001)
    assert pair(comparison_of(rounds(100), rounds(100.1)).pairs, "decode").comparison.verdict == "same"


def test_runs_of_one_round_have_only_a_ratio() -> None:
    decode = pair(comparison_of(make_run(cell("fp16", 100)), make_run(cell("fp16", 50))).pairs, "decode")
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
def test_a_cell_without_a_counterpart_is_listed_with_the_reason(other: CellRecord, why: str) -> None:
    found = comparison_of(make_run(cell("fp16", 100)), make_run(other))
    assert found.pairs == []
    assert len(found.unmatched) == 2
    assert why in found.unmatched[0]


def test_a_cell_that_failed_in_one_run_is_listed(golden: Golden) -> None:
    lost = make_cell("fp16", job=make_job(workload=Workload(prompts=["one"], new_tokens=5)), trials=[])
    lost = msgspec.structs.replace(lost, outcome=Failed(kind="out-of-memory", message="no room"))
    found = comparison_of(make_run(cell("fp16", 100)), make_run(lost))
    assert found.pairs == []
    (line,) = found.unmatched
    assert line.startswith("fp16 eager: ")
    golden(line)


def test_other_differences_are_listed() -> None:
    one, other = make_run(cell("fp16", 100)), make_run(cell("fp16", 100))
    machine = msgspec.structs.replace(other.environment, commit="beef", driver="600.1")
    other = msgspec.structs.replace(other, environment=machine)
    output = comparison_of(one, other).differences
    assert any(line.startswith("commit: ") and line.endswith("vs. beef") for line in output)
    assert any(line.startswith("driver: ") for line in output)


@pytest.mark.parametrize(
    ("limit", "tok_s", "status"),
    [
        ("decode<0.95", 90, 1),
        ("decode < 0.95", 94.9, 0),  # the interval includes the limit
        ("decode<0.95", 100, 0),
        ("decode>1.02", 110, 1),
        ("ttft>1.05", 90, 1),
    ],
)
def test_a_limit_is_broken_only_beyond_the_noise(
    tmp_path: Path, limit: str, tok_s: float, status: int
) -> None:
    first, second = keep(rounds(100), tmp_path / "a"), keep(rounds(tok_s), tmp_path / "b")
    result = invoke(first, second, "--fail-if", limit)
    assert result.return_value == status
    assert (f"breaks {limit}" in result.stderr) == bool(status)


def test_one_round_breaks_no_speed_limit_but_warns(tmp_path: Path) -> None:
    first = keep(make_run(cell("fp16", 100)), tmp_path / "a")
    second = keep(make_run(cell("fp16", 50)), tmp_path / "b")
    result = invoke(first, second, "--fail-if", "decode<0.95")
    assert result.return_value == 0
    assert "may break decode<0.95: one round can't tell" in result.stderr


def test_memory_needs_no_rounds() -> None:
    result = invoke(RECORDED / "h100-modes/7b", RECORDED / "h100-modes/7b", "--fail-if", "peak>0.99")
    assert result.return_value == 1
    assert "fp16 graph: peak 1.00× breaks peak>0.99" in result.stderr


@pytest.mark.parametrize("text", ["decode", "decode<", "speed<0.9", "decode=1", "decode<x"])
def test_an_invalid_limit(text: str) -> None:
    with pytest.raises(BadInput, match="is not a valid limit"):
        parse_limit(text)


def test_recorded_runs_of_an_h100() -> None:
    result = invoke(RECORDED / "h100-modes/7b-prompts", RECORDED / "h100-long-prompts")
    assert result.return_value == 0
    row = next(line for line in result.stdout.splitlines() if "2048" in line and "decode, tok/s" in line)
    assert row.split()[-7:] == ["98.8", "126.4", "1.28×", "one", "round:", "no", "interval"]
    assert "commit: 541be5341570 vs. 8ed3b44627bb" in result.stdout
    output = invoke(RECORDED / "h100-modes/7b-prompts", RECORDED / "h100-long-prompts", "--json").stdout
    assert len(msgspec.json.decode(output, type=Comparisons).runs) == 1


def test_gpus_side_by_side() -> None:
    run = read_run(RECORDED / "h100-precisions-7b")
    (row,) = gpu_speedups({"7b": measure_run(run)})
    assert (row.run, row.measured) == ("7b", "")
    assert row.tensor_cores == ["INT8", "FP8"]
    assert row.best["awq"].versus_baseline == pytest.approx(0.757, abs=0.001)
    assert "NVIDIA H100 80GB HBM3  INT8, FP8" in invoke(RECORDED / "h100-precisions-7b").stdout
    assert gpu_speedups({"none": measure_run(make_run())}) == []


def test_runs_of_several_gpus_make_a_row_each(tmp_path: Path) -> None:
    source = RECORDED / "h100-precisions-7b"
    slow = brought(source, tmp_path / "t4", "Tesla T4", (7, 5))
    none = brought(source, tmp_path / "v100", "Tesla V100", (7, 0))
    small = brought(RECORDED / "h100-precisions-0.5b", tmp_path / "small", "L4", (8, 9))
    alone = tmp_path / "a100.jsonl"
    alone.write_text((slow / "records.jsonl").read_text().replace("Tesla T4", "A100"))
    table = invoke(source, slow, none, alone).stdout.rpartition("limited the speed")[2].splitlines()
    rows = [line.split() for line in table if "129.3" in line]
    assert [row[-5:] for row in rows] == [["FP8", "129.3", "(0.06×)", "1.06×", "0.76×"]] + [
        [cores, "129.3", "(0.06×)", "1.06×", "0.76×"] for cores in ("INT4", "none", "–")
    ]
    assert [row[0] for row in rows] == [source.name, "t4", "v100", "a100.jsonl"]
    # Each row says how it differs.
    output = json.loads(invoke(source, small, "--json").stdout)["gpus"]
    assert [row["measured"] for row in output] == ["model random-qwen2.5-7b", "model random-qwen2.5-0.5b"]


def test_a_row_is_about_one_workload() -> None:
    """A precision that failed on FP16's workload has no figure, even if it has one on another workload."""
    lost = Failed(kind="out-of-memory", message="no room")
    cells = [cell(name, 100, batch_size=batch) for name in ("fp16", "awq") for batch in (1, 4)]
    cells[2] = msgspec.structs.replace(cells[2], outcome=lost, trials=[])
    (row,) = gpu_speedups({"run": measure_run(make_run(*cells))})
    assert list(row.best) == ["fp16"]


def brought(source: Path, folder: Path, gpu: str, capability: tuple[int, int]) -> Path:
    """The same run as if measured on another GPU."""
    shutil.copytree(source, folder)
    archived = folder / "records.jsonl.gz"
    (folder / "records.jsonl").write_bytes(gzip.decompress(archived.read_bytes()))
    archived.unlink()
    for name in ("records.jsonl", "environment.json"):
        file = folder / name
        file.write_text(file.read_text().replace("NVIDIA H100 80GB HBM3", gpu))
    machine = json.loads((folder / "environment.json").read_text())
    machine["gpus"][0]["compute_capability"] = capability
    (folder / "environment.json").write_text(json.dumps(machine))
    return folder


@pytest.mark.parametrize(("gpu", "has"), [(H100, ["INT8", "FP8"]), (T4, ["INT8", "INT4"])])
def test_the_formats_of_tensor_cores(gpu: object, has: list[str]) -> None:
    run = make_run(cell("fp16", 100))
    ready = msgspec.structs.replace(run.cells[0].ready, device_uuid=gpu.uuid)  # type: ignore[attr-defined]
    run = make_run(msgspec.structs.replace(run.cells[0], ready=ready))
    machine = msgspec.structs.replace(run.environment, gpus=[gpu])
    run = msgspec.structs.replace(run, environment=machine)
    assert gpu_speedups({"run": measure_run(run)})[0].tensor_cores == has


# Quality


def answering(precision: str, *prefixes: int) -> CellRecord:
    """Answers of ten tokens, each equal to FP16's up to where it diverges."""
    trials = [
        make_trial(index, token_ids=[*range(at), *range(100, 110 - at)]) for index, at in enumerate(prefixes)
    ]
    job = make_job(precision, workload=Workload(prompts=["some"], new_tokens=10))
    return make_cell(precision, job=job, trials=trials)


def answers(*prefixes: int) -> Run:
    return make_run(answering("fp16", *[10] * len(prefixes)), answering("int8", *prefixes))


def test_quality_is_compared_prompt_by_prompt() -> None:
    found = comparison_of(answers(10, 8, 6, 8, 10, 10), answers(4, 2, 2, 2, 3, 4)).pairs
    quality = pair(found, "quality")
    assert quality.precision == "int8"  # FP16 is the reference
    assert (quality.reference, quality.value) == pytest.approx((5.2 / 6, 1.7 / 6))
    assert quality.comparison.ratio == pytest.approx(1.7 / 5.2)
    assert quality.comparison.verdict == "slower"
    same = pair(comparison_of(answers(10, 8, 6, 8, 10), answers(10, 8, 6, 8, 10)).pairs, "quality")
    assert same.comparison.verdict == "same"


def test_tokens_of_both_runs_are_compared() -> None:
    found = comparison_of(answers(10, 8, 6), answers(10, 4, 6)).pairs
    fp16, int8 = (each for each in found if each.figure == "tokens")
    assert (fp16.value, fp16.comparison.why) == (1, "the same")
    assert int8.value == pytest.approx(2.4 / 3)
    assert int8.comparison.why == "different tokens in 1 of 3 prompts"


def test_a_quality_of_0_has_no_ratio_and_is_listed(golden: Golden) -> None:
    found = comparison_of(answers(0, 0), answers(5, 5))
    assert [each for each in found.pairs if each.figure == "quality"] == []
    (line,) = found.unmatched
    assert line.startswith("int8 eager: quality ")
    golden(line)


@pytest.mark.parametrize(
    ("limit", "prefixes", "status", "message"),
    [
        ("quality<0.9", (4, 2, 2, 2, 3, 4), 1, "breaks quality<0.9"),
        ("quality<0.9", (10, 8, 6, 8, 10, 10), 0, ""),
        ("quality<0.9", (4, 2), 0, "may break quality<0.9: 2 prompts can't tell"),
        ("tokens<1", (10, 8, 6, 8, 10, 9), 1, "int8 eager: tokens 0.98× breaks tokens<1"),
        ("tokens<1", (10, 8, 6, 8, 10, 10), 0, ""),
    ],
)
def test_limits_of_quality(
    tmp_path: Path, limit: str, prefixes: tuple[int, ...], status: int, message: str
) -> None:
    first = keep(answers(*(10, 8, 6, 8, 10, 10)[: len(prefixes)]), tmp_path / "a")
    second = keep(answers(*prefixes), tmp_path / "b")
    result = invoke(first, second, "--fail-if", limit)
    assert result.return_value == status
    assert message in result.stderr
    assert bool(result.stderr) == bool(message)


def test_recorded_tokens_are_compared_only_for_real_weights() -> None:
    real = invoke(RECORDED / "h100-smollm2", RECORDED / "h100-smollm2-three").stdout
    assert "tokens, as first run          100%                100%  1.00×  the same" in real
    drawn = invoke(RECORDED / "h100-precisions-7b", RECORDED / "h100-precisions-7b").stdout
    assert "quality" not in drawn
    assert "tokens, as" not in drawn


# Files of records, and old ones


def test_a_records_file_may_be_named_instead_of_its_folder() -> None:
    one, other = RECORDED / "h100-modes/7b-prompts", RECORDED / "h100-long-prompts"
    by_file = invoke(one / "records.jsonl.gz", other / "records.jsonl.gz")
    assert by_file.stdout == invoke(one, other).stdout


def test_records_of_another_machine_need_no_folder(tmp_path: Path) -> None:
    brought = tmp_path / "theirs.jsonl.gz"
    shutil.copy(RECORDED / "h100-long-prompts/records.jsonl.gz", brought)
    result = invoke(RECORDED / "h100-modes/7b-prompts", brought)
    row = next(line for line in result.stdout.splitlines() if "2048" in line and "decode, tok/s" in line)
    assert row.split()[-7:-4] == ["98.8", "126.4", "1.28×"]
    assert "commit: 541be5341570 vs. unknown" in result.stdout


def test_few_rounds_break_no_limit(tmp_path: Path) -> None:
    first, second = rounds(100), rounds(50)
    for name, run in (("a", first), ("b", second)):
        keep(msgspec.structs.replace(run, cells=run.cells[:3]), tmp_path / name)
    result = invoke(tmp_path / "a", tmp_path / "b", "--fail-if", "decode<0.95")
    assert result.return_value == 0
    assert "may break decode<0.95: 3 rounds can't tell" in result.stderr


def test_records_of_the_first_version_compare_with_current_ones(tmp_path: Path, golden: Golden) -> None:
    old = json.loads((GOLDEN / "records.jsonl").read_text().splitlines()[0])
    assert not {"decode", "depth"} & set(old["job"]["workload"])
    today = keep(read_run(RECORDED / "h100-random-qwen2.5-0.5b"), tmp_path / "today")
    result = invoke(GOLDEN, today, "--fail-if", "loaded>1.001", "--fail-if", "peak>1.001", "--json")
    assert result.return_value == 0
    (found,) = msgspec.json.decode(result.stdout, type=Comparisons).runs.values()
    figures = ["decode", "ttft", "prefill", "loaded", "peak"]
    assert [(each.precision, each.figure) for each in found.pairs] == [
        (name, figure) for name in ("fp16", "int8", "int8-t0", "awq") for figure in figures
    ]
    assert [line.split(":")[0] for line in found.unmatched] == ["fp32 eager", "bf16 eager"]
    golden(found.unmatched)
    awq = found.pairs[15]
    assert (round(awq.reference, 1), round(awq.value, 1)) == (21.9, 21.4)
    back = invoke(today, GOLDEN).stdout.splitlines()
    row = next(line.split() for line in back if line.startswith(" awq") and "decode, tok/s" in line)
    assert row[4:7] == ["21.4", "21.9", "1.02×"]
