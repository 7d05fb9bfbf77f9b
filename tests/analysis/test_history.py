"""A figure over time: which runs share a table, in what order, and which changes get a verdict."""

from pathlib import Path

import msgspec
import pytest
from call_counts import count_calls
from click.testing import CliRunner, Result
from conftest import ROOT
from sample_records import make_cell, make_job, make_run, make_trial

from orchestrator.analysis.comparison.history import History
from orchestrator.cli.compare import compare
from orchestrator.errors import BadInput
from orchestrator.records.store import RunFolder
from schemas.job import ModelSource, Workload
from schemas.record import CellRecord, Run

RECORDED = ROOT / "tests/golden"
QWEN = ModelSource(kind="hub", location="Qwen/Qwen2.5-7B-Instruct", name="qwen2.5-7b-instruct")


def cell(day: int, tok_s: float, precision: str = "fp16", round_: int = 0, **fields: object) -> CellRecord:
    trial = make_trial(decode_s=4 / tok_s, token_s=[1 / tok_s] * 4)
    job = make_job(precision, round=round_, **({"model": QWEN} | fields))
    started_at = f"2026-01-{day:02}T10:00:00+00:00"
    return make_cell(precision, job=job, trials=[trial], started_at=started_at)


def rounds(day: int, tok_s: float) -> Run:
    return make_run(*(cell(day, tok_s * (1 + 0.002 * (at - 3)), round_=at) for at in range(7)))


def keep(run: Run, folder: Path, commit: str = "beef") -> None:
    kept = RunFolder.create(folder, run.plan, msgspec.structs.replace(run.environment, commit=commit))
    for each in run.cells:
        kept.append(each)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(compare, list(map(str, arguments)), standalone_mode=False)


def history_of(*arguments: object) -> History:
    return msgspec.json.decode(invoke(*arguments, "--json").stdout, type=History)


def bad_input(*arguments: object) -> str:
    error = invoke(*arguments).exception
    assert isinstance(error, BadInput)
    return str(error)


def test_runs_are_in_chronological_order_each_relative_to_the_previous_one(tmp_path: Path) -> None:
    for name, day, tok_s in (("c", 1, 100), ("deep/a", 3, 50), ("b", 2, 80)):
        keep(make_run(cell(day, tok_s)), tmp_path / name, commit=f"c{day}")
    (series,) = history_of("--history", tmp_path).series
    assert [point.run for point in series.points] == ["c", "b", "deep/a"]
    assert [point.value for point in series.points] == pytest.approx([100, 80, 50])
    changes = [point.change.ratio if point.change else None for point in series.points]
    assert changes == [None, pytest.approx(0.8), pytest.approx(0.625)]
    assert all(point.change is None or point.change.verdict is None for point in series.points)
    rows = [line.split() for line in invoke("--history", tmp_path).stdout.splitlines() if "2026-" in line]
    assert rows[2] == ["2026-01-03", "10:00", "deep/a", "c3", "2.11.0", "50.0", "████████", "0.63×"]


def test_rounds_give_a_change_its_interval_and_a_verdict_beyond_the_noise(tmp_path: Path) -> None:
    for day, tok_s in enumerate((100, 100.1, 90), start=1):
        keep(rounds(day, tok_s), tmp_path / f"run{day}")
    rows = [line.strip() for line in invoke("--history", tmp_path).stdout.splitlines() if "2026-" in line]
    assert rows[1].endswith("  1.00× [1.00, 1.01]")  # the same, which is no change
    assert rows[2].endswith("  0.90× [0.90, 0.90] slower")
    (series,) = history_of("--history", tmp_path).series
    verdicts = [point.change.verdict if point.change else None for point in series.points]
    assert verdicts == [None, "same", "slower"]


def test_different_settings_make_separate_tables(tmp_path: Path) -> None:
    ready = msgspec.structs.replace(cell(1, 1).ready, device_name="T4")
    graph = Workload(prompts=["one"], new_tokens=5, decode="graph")
    keep(make_run(cell(1, 100), cell(1, 30, "int8"), cell(1, 200, workload=graph)), tmp_path / "a")
    keep(make_run(msgspec.structs.replace(cell(2, 20), ready=ready)), tmp_path / "b")
    keep(make_run(cell(3, 9, workload=Workload(prompts=["two"], new_tokens=5))), tmp_path / "c")
    found = history_of("--history", tmp_path).series
    assert [(each.gpu, each.precision, each.decode, len(each.points)) for each in found] == [
        ("H100", "fp16", "eager", 1),
        ("H100", "int8", "eager", 1),
        ("H100", "fp16", "graph", 1),
        ("H100", "fp16", "eager", 1),
        ("T4", "fp16", "eager", 1),
    ]
    assert found[0].workload.startswith("prompts 1 (")
    assert found[0].workload != found[3].workload
    assert found[4].workload == ""


@pytest.mark.parametrize(
    ("chosen", "tables"),
    [
        (["--model", "Qwen/Qwen2.5-7B-Instruct"], 2),
        (["-m", "QWEN2.5-7b"], 2),
        (["-p", "int8"], 1),
        (["-p", "int8", "-p", "fp16"], 3),
        (["--gpu", "h100"], 3),
    ],
)
def test_tables_are_selected_by_options(tmp_path: Path, chosen: list[str], tables: int) -> None:
    tiny = make_job().model
    keep(make_run(cell(1, 100), cell(1, 30, "int8"), cell(1, 200, model=tiny)), tmp_path / "a")
    assert len(history_of("--history", tmp_path, *chosen).series) == tables


def test_quality_over_time_is_a_mean_over_prompts(tmp_path: Path) -> None:
    for day, parting in ((1, 4), (2, 2)):
        trials = [make_trial(at, token_ids=[0] * parting + [9] * (5 - parting)) for at in range(5)]
        int8 = msgspec.structs.replace(cell(day, 1, "int8"), trials=trials)
        fp16 = msgspec.structs.replace(
            cell(day, 1), trials=[make_trial(at, token_ids=[0] * 5) for at in range(5)]
        )
        keep(make_run(fp16, int8), tmp_path / f"run{day}")
    (series,) = history_of("--history", tmp_path, "--figure", "quality").series
    assert (series.precision, [point.value for point in series.points]) == ("int8", [0.8, 0.4])
    shown = invoke("--history", tmp_path, "--figure", "quality").stdout
    assert "0.50× [0.50, 0.50] farther from FP16" in shown


def test_a_run_that_cannot_be_read_is_reported_and_skipped(tmp_path: Path) -> None:
    keep(make_run(cell(1, 100)), tmp_path / "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "records.jsonl").write_text("{}\n")
    result = invoke("--history", tmp_path)
    assert result.return_value == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"skipped: RUN {tmp_path / 'bad'}")
    assert "100.0" in result.stdout
    (tmp_path / "good" / "records.jsonl").unlink()
    assert "can't be read" in bad_input("--history", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "A B…: is missing. Name run folders, or use --history DIR"),
        (["A", "--model", "x"], "--model x: only works with --history. Add --history DIR"),
        (["A", "--figure", "ttft"], "--figure ttft: only works with --history"),
        (["A", "--history", RECORDED], "can't be combined with runs or --fail-if"),
        (["--history", RECORDED, "--fail-if", "decode<1"], "can't be combined with runs or --fail-if"),
        (["--history", "nowhere"], "has no such decode figure. Name a folder that contains"),
        (
            ["--history", RECORDED, "-m", "gpt"],
            "Its runs are of random-qwen2.5-0.5b, random-qwen2.5-7b, smollm2-135m-instruct",
        ),
    ],
)
def test_bad_input_is_a_one_line_error(arguments: list[object], problem: str) -> None:
    line = bad_input(*arguments)
    assert problem in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("figure", "first", "second"),
    [
        ("decode", "98.8", "126.4"),
        ("ttft", "59.6", "57.5"),
        ("loaded", "14,527", "14,527"),
        ("peak", "14,987", "14,987"),
    ],
)
def test_recorded_runs_of_an_h100(figure: str, first: str, second: str) -> None:
    shown = invoke("--history", RECORDED, "-m", "7b", "-p", "fp16", "--figure", figure).stdout
    title = f"{figure} of fp16 graph (prompts 3 drawn, prompt tokens 2048, batch size 1, new tokens 64)"
    table = shown.partition(title)[2]
    rows = [line.split() for line in table.splitlines() if "2026-" in line][:2]
    assert [(row[2], row[3], row[5]) for row in rows] == [
        ("h100-modes/7b-prompts", "541be5341570", first),
        ("h100-long-prompts", "8ed3b44627bb", second),
    ]


def copies(source: Path, folder: Path, count: int) -> Path:
    """A folder with `count` runs, all of them links to one."""
    for at in range(count):
        run = folder / f"run{at}"
        run.mkdir(parents=True)
        for file in source.glob("*.*"):
            (run / file.name).symlink_to(file)
    return folder


def test_work_grows_in_proportion_to_the_runs(tmp_path: Path) -> None:
    """`benchmarks/parent_speed.py` prints how long hundreds of runs take."""
    source = RECORDED / "h100-modes/0.5b"
    few, many = (copies(source, tmp_path / str(count), count) for count in (20, 40))
    assert len(history_of("--history", many).series[0].points) == 40
    assert count_calls(lambda: history_of("--history", many)) < 2.5 * count_calls(
        lambda: history_of("--history", few)
    )
