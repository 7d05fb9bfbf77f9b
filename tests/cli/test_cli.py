"""The commands as a user runs them: output on stdout and stderr, exit status, and files."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import msgspec
import psutil
import pytest
from analyses import rows_of
from commands import COLOR, command, environment, run, run_on_terminal
from conftest import Qbench
from golden_text import Golden, without_names

import orchestrator
from orchestrator.precisions.catalog import find_precisions
from orchestrator.records.keys import key_of
from orchestrator.records.store import read_run
from schemas.frames import AnyFrame, Done, Failed, Loaded, Phase, Ready, Trial
from schemas.job import RANDOM_WEIGHTS_WARNING
from schemas.record import Run, Skipped

ANY_ESCAPE = "\x1b"


# Without a model


def test_help_shows_forms_and_defaults(qbench: Qbench) -> None:
    text = " ".join(qbench("orchestrate", "--help").stdout.split())
    assert re.search(r"--new-tokens RANGE [^\[]*\[default: 128\]", text)
    assert "-p, --precision NAME" in text


@pytest.mark.parametrize("script", ["orchestrate", "worker"])
def test_list(qbench: Qbench, script: str, tmp_path: Path) -> None:
    done = qbench(script, "--list")
    assert done.returncode == 0
    first_words = [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
    listed = [word for word in first_words if word in find_precisions()]
    assert listed == list(find_precisions())
    assert ANY_ESCAPE not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_dry_run_prints_the_plan_and_writes_nothing(golden: Golden, qbench: Qbench, tmp_path: Path) -> None:
    options = ["--model", "random:qwen2.5-0.5b", "--new-tokens", "7", "--batch-size", "2", "--device", "cpu"]
    done = qbench("orchestrate", "-p", "int8", "-p", "fp16", *options, "--dry-run")
    assert done.returncode == 0
    notice, int8, fp16, cells, budget, _ = done.stdout.splitlines()
    assert notice == RANDOM_WEIGHTS_WARNING
    assert int8.startswith("int8: random-qwen2.5-0.5b on cpu, 20 prompts × 7 new tokens, batch 2, ")
    assert fp16.startswith("fp16: ")
    assert cells == "2 cells"
    assert budget == "budget: 3 min 30 s"
    golden(re.sub(r"under \S+", "under PYTHON", done.stdout))
    assert list(tmp_path.iterdir()) == []


# Invalid input: one line with the option, the value and a fix

P = ("-p", "fp16")
RANDOM = (*P, "--model", "random:qwen2.5-0.5b")

BAD = {
    "unknown precision": (["-p", "fp17"], "--precision fp17: "),
    "nothing to measure": (["--model", "random:qwen2.5-0.5b"], "--precision: "),
    "no tokens": ([*P, "--new-tokens", "0"], "--new-tokens 0: "),
    "tokens in words": ([*P, "--new-tokens", "abc"], "--new-tokens abc: "),
    "too many tokens": ([*P, "--new-tokens", "999999"], "--new-tokens 999999: "),
    "negative batch": ([*P, "--batch-size", "-1"], "--batch-size -1: "),
    "empty batch": ([*P, "--batch-size", "4,0"], "--batch-size 4,0: "),
    "mode": ([*P, "--decode", "eager", "--decode", "fast"], "--decode eager,fast: "),
    "not a percentage": ([*P, "--precise", "much"], "--precise much: "),
    "too precise": ([*P, "--precise", "0%"], "--precise 0%: "),
    "no rounds": ([*P, "--rounds", "0"], "--rounds 0: "),
    "negative warm-up": ([*P, "--warmup", "-1"], "--warmup -1: "),
    "no budget": ([*P, "--budget", "0"], "--budget 0: "),
    "budget that is not a number": ([*P, "--budget", "nan"], "--budget nan: "),
    "no time": ([*P, "--timeout", "-5"], "--timeout -5: "),
    "no GPU": ([*RANDOM, "--device", "cuda"], "--device cuda: "),
    "unknown device": ([*RANDOM, "--device", "toaster"], "--device toaster: "),
    "unknown model": ([*P, "--model", "nonexistent"], "--model nonexistent: "),
    "empty folder": ([*P, "--model", "empty"], "--model empty: "),
    "broken GGUF": ([*P, "--model", "broken.gguf"], "--model broken.gguf: "),
    "unknown random model": ([*P, "--model", "random:nope"], "--model random:nope: "),
    "missing prompts": ([*RANDOM, "--prompts", "absent.txt"], "--prompts absent.txt: "),
    "empty prompts": ([*RANDOM, "--prompts", "empty.txt"], "--prompts empty.txt: "),
    "checkpoint without a path": ([*RANDOM, "--checkpoint", "awq"], "--checkpoint awq: "),
    "checkpoint for an unknown precision": ([*RANDOM, "--checkpoint", "awk=x"], "--checkpoint awk: "),
    "python without a path": ([*RANDOM, "--python", "awq="], "--python awq=: "),
    "python for an unknown precision": ([*RANDOM, "--python", f"awk={sys.executable}"], "--python awk: "),
    "missing python": ([*RANDOM, "--python", "awq=./absent"], "--python ./absent: "),
    "used folder": ([*RANDOM, "--out", "used"], "--out used: "),
    "plan for a run to resume": (["--resume", "used", "--plan", "empty.txt"], "--plan empty.txt: "),
    "folder in a file": ([*RANDOM, "--out", "empty.txt/run"], "--out empty.txt/run: "),
}
BAD_IN_OTHER_WORDS = {
    "python that is something else": ([*RANDOM, "--python", "awq=./not-python"], "/not-python: "),
    # click's own messages
    "unknown option": ([*P, "--new-token", "3"], "--new-tokens"),
    "stray word": ([*P, "fp32"], "fp32"),
}


@pytest.fixture
def folder_of_traps(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "plan.json").write_text("{}")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "broken.gguf").write_bytes(b"PK")
    (tmp_path / "not-python").write_text("#!/bin/sh\necho hello\n")
    (tmp_path / "not-python").chmod(0o755)
    return tmp_path


def bad_input_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(("arguments", "named"), BAD.values(), ids=BAD)
def test_bad_input(
    golden: Golden, qbench: Qbench, folder_of_traps: Path, arguments: list[str], named: str
) -> None:
    before = sorted(folder_of_traps.rglob("*"))
    line = bad_input_line(qbench("orchestrate", *arguments, env={"HF_HUB_OFFLINE": "1"}))
    assert line.startswith(f"error: {named}")
    golden(without_names(line))
    assert sorted(folder_of_traps.rglob("*")) == before


@pytest.mark.parametrize(("arguments", "named"), BAD_IN_OTHER_WORDS.values(), ids=BAD_IN_OTHER_WORDS)
def test_bad_input_reported_by_click(
    qbench: Qbench, folder_of_traps: Path, arguments: list[str], named: str
) -> None:
    assert named in bad_input_line(qbench("orchestrate", *arguments))


@pytest.mark.parametrize(
    ("script", "arguments", "named"),
    [
        pytest.param("worker", [], "PRECISION: ", id="nothing to run"),
        pytest.param("worker", ["fp17"], "--precision fp17: ", id="unknown precision"),
        pytest.param("worker", ["fp16,fp32"], "--precision fp16,fp32: ", id="two precisions"),
        pytest.param("worker", ["fp16", "--new-tokens", "0"], "--new-tokens 0: ", id="no tokens"),
        pytest.param("memory", [], "RUN: ", id="no run"),
        pytest.param("memory", ["absent"], "RUN absent: ", id="missing run"),
        pytest.param("report", ["empty.txt"], "RUN empty.txt: ", id="not a run"),
        pytest.param("report", ["used"], "RUN used: ", id="unreadable run"),
        pytest.param("compare", [], "A B…: ", id="nothing to compare"),
    ],
)
def test_bad_input_to_the_other_commands(
    golden: Golden, qbench: Qbench, folder_of_traps: Path, script: str, arguments: list[str], named: str
) -> None:
    line = bad_input_line(qbench(script, *arguments))
    assert line.startswith(f"error: {named}")
    golden(without_names(line))


def test_an_unknown_format_is_refused_with_the_known_ones(qbench: Qbench, folder_of_traps: Path) -> None:
    line = bad_input_line(qbench("report", "used", "--format", "xml"))
    assert all(form in line for form in ("xml", "table", "md", "csv", "json"))


def without_figures(text: str) -> str:
    """`text` without figures that depend on the machine's speed."""
    return re.sub(r"[\d.,]+ (tok/s|s|min \d+ s)\b", r"N \1", text)


# One run, shared


class Measured(NamedTuple):
    done: subprocess.CompletedProcess[str]
    folder: Path
    run: Run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of this module's runs, with a file of two prompts."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "prompts.txt").write_text("What is a hash table?\nName a river.\n")
    return folder


@pytest.fixture(scope="module")
def model_options(place: Path, tiny_llama: Path) -> list[str]:
    return ["--model", str(tiny_llama), "--prompts", str(place / "prompts.txt"), "--device", "cpu"]


@pytest.fixture(scope="module")
def measured(place: Path, model_options: list[str], cache: Path) -> Measured:
    argv = command("orchestrate", "-p", "fp16", "-p", "fp32", "--new-tokens", "4", "--out", "run")
    done = run([*argv, *model_options], place, environment(cache))
    assert done.returncode == 0, done.stderr
    return Measured(done, place / "run", read_run(place / "run"))


@pytest.mark.slow
def test_the_table_goes_to_stdout(measured: Measured) -> None:
    lines = measured.done.stdout.splitlines()
    assert lines[0].startswith("tiny-llama on ")
    assert "2 prompts × 4 new tokens, batch 1, greedy" in measured.done.stdout
    rows = {line.split()[0]: line.split() for line in lines if line.strip()}
    assert rows["fp16"][3] == "1.00×"
    assert rows["fp32"][-1] == "-100%"
    assert "no NVIDIA GPU" in measured.done.stdout
    assert max(map(len, lines[:6])) <= 120
    for name in ("records.jsonl", "samples", "logs"):
        (path,) = re.findall(rf"run/{name}$", measured.done.stdout, re.MULTILINE)
        assert (measured.folder.parent / path).exists()


@pytest.mark.slow
def test_progress_goes_to_stderr_in_plain_lines(golden: Golden, measured: Measured) -> None:
    lines = measured.done.stderr.splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == ["[1/2] fp16"] * 2 + ["[2/2] fp32"] * 2
    assert re.search(r" [\d.,]+ tok/s, 2 trials, \d+ (s|min)", lines[2])
    golden(without_figures(line) for line in lines)
    assert ANY_ESCAPE not in measured.done.stdout + measured.done.stderr


@pytest.mark.slow
def test_the_run_folder_contains_the_raw_data(measured: Measured, model_options: list[str]) -> None:
    plan, environment_ = measured.run.plan, measured.run.environment
    assert plan.command[0] == "qbench-orchestrate"
    assert plan.command[-len(model_options) :] == model_options
    assert plan.options.new_tokens == [4]
    assert [job.precision for job in plan.jobs] == ["fp16", "fp32"]
    assert environment_.qbench == orchestrator.__version__
    assert environment_.cpu_count == os.cpu_count()
    assert environment_.gpus == []
    assert environment_.gpu_reason
    kinds = {path.relative_to(measured.folder).as_posix() for path in measured.folder.rglob("*.*")}
    assert kinds == {
        "plan.json",
        "environment.json",
        "records.jsonl",
        "peaks.json",
        "samples/fp16-eager-n4.jsonl",
        "samples/fp32-eager-n4.jsonl",
        "logs/peaks.log",
        "logs/fp16.log",
        "logs/fp32.log",
    }


@pytest.mark.slow
def test_each_record_contains_the_data_of_its_figures(measured: Measured) -> None:
    for cell, dtype in zip(measured.run.cells, ("float16", "float32"), strict=True):
        assert cell.outcome == Done(
            at_ns=cell.outcome.at_ns if isinstance(cell.outcome, Done) else 0,
            trials_planned=2,
            trials_measured=2,
            sample_text=cell.outcome.sample_text if isinstance(cell.outcome, Done) else None,
        )
        names = [edge.phase.name for edge in cell.edges]
        assert names == [
            "start", "context", "load", "setup", "warmup", "prefill", "decode", "prefill", "decode",
            "profile", "end",
        ]  # fmt: skip
        times = [edge.phase.at_ns for edge in cell.edges]
        assert times == sorted(times)
        assert [trial.new_tokens for trial in cell.trials] == [4, 4]
        assert cell.trials[0].prompt_tokens > cell.trials[1].prompt_tokens > 0
        assert cell.loaded is not None
        assert set(cell.loaded.weight_bytes) >= {dtype}
        assert cell.ready is not None
        assert {"torch", "transformers"} <= set(cell.ready.versions)
        assert cell.ready.device_uuid is None
        readings = [edge.reading for edge in cell.edges]
        assert all(reading and reading.process_bytes and reading.reason for reading in readings)
        assert cell.samples
        assert cell.sampler is not None
        assert cell.sampler.source == "resident-set"
        assert cell.log
        assert (measured.folder / cell.log).exists()


@pytest.mark.slow
def test_every_worker_is_a_separate_process(measured: Measured) -> None:
    pids = {cell.ready.pid for cell in measured.run.cells if cell.ready}
    assert len(pids) == 2
    assert os.getpid() not in pids


@pytest.mark.slow
def test_a_run_is_not_overwritten(qbench: Qbench, measured: Measured) -> None:
    before = (measured.folder / "records.jsonl").read_bytes()
    done = qbench("orchestrate", *RANDOM, "--out", measured.folder)
    assert bad_input_line(done).startswith(f"error: --out {measured.folder}: ")
    assert (measured.folder / "records.jsonl").read_bytes() == before


@pytest.mark.slow
def test_the_report_agrees_with_the_records_in_four_formats(qbench: Qbench, measured: Measured) -> None:
    rows = {row.precision: row for row in rows_of(measured.run)}
    forms = {
        form: qbench("report", measured.folder, "--format", form).stdout
        for form in ("table", "md", "csv", "json")
    }
    summary = json.loads(forms["json"])
    assert {row["precision"]: row["decode_tok_s"] for row in summary["rows"]} == {
        name: row.decode_tok_s for name, row in rows.items()
    }
    in_csv = csv.DictReader(forms["csv"].splitlines())
    assert {row["precision"]: float(row["decode_tok_s"]) for row in in_csv} == {
        name: row.decode_tok_s for name, row in rows.items()
    }
    assert summary["qbench"] == orchestrator.__version__
    for name in rows:
        (in_md,) = [line for line in forms["md"].splitlines() if line.startswith(f"| {name} ")]
        (in_table,) = [line for line in forms["table"].splitlines() if line.split()[:1] == [name]]
        assert [cell.strip() for cell in in_md.strip("|").split("|")] == in_table.split()
        assert in_table in measured.done.stdout  # the run printed the same


@pytest.mark.slow
def test_memory_by_phase(qbench: Qbench, measured: Measured) -> None:
    table = qbench("memory", measured.folder)
    assert table.returncode == 0
    assert table.stdout.count("MiB at the end of each phase") == 2
    shown = qbench("memory", measured.folder, "--json", "-p", "fp32")
    ledger = json.loads(shown.stdout)
    (phases,) = ledger["phases"].values()
    assert any("no NVIDIA GPU" in note for note in ledger["notes"])
    assert [phase["phase"] for phase in phases] == [
        "start", "context", "load", "setup", "warmup", "prefill", "decode", "profile",
    ]  # fmt: skip
    for phase in phases:
        assert phase["sampled_peak_bytes"] >= phase["process_bytes"] > 0
        assert phase["allocated_bytes"] is None  # torch keeps no ledger on a CPU
    loaded = phases[2]["process_bytes"]
    assert loaded == rows_of(measured.run)[1].loaded_bytes


@pytest.mark.slow
def test_memory_of_a_precision_that_was_not_measured(
    golden: Golden, qbench: Qbench, measured: Measured
) -> None:
    done = qbench("memory", measured.folder, "--precision", "nope")
    line = bad_input_line(done)
    assert line.startswith("error: --precision nope: ")
    golden(line)


@pytest.mark.slow
def test_a_reader_may_close_the_pipe_early(measured: Measured, cache: Path, place: Path) -> None:
    writer = subprocess.Popen(
        command("memory", measured.folder, "--json"),
        cwd=place,
        env=environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert writer.stdout is not None
    writer.stdout.close()
    _, error = writer.communicate(timeout=30)
    assert b"Traceback" not in error


# Failures are rows


@pytest.fixture(scope="module")
def half_failed(place: Path, model_options: list[str], cache: Path, tiny_llama: Path) -> Measured:
    """One cell with a truncated checkpoint, and one that works; both prompts in one batch."""
    corrupt = place / "corrupt"
    shutil.copytree(tiny_llama, corrupt)
    weights = corrupt / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    argv = command("orchestrate", "-p", "fp32", "-p", "fp16", "--checkpoint", f"fp32={corrupt}", "--json")
    options = ["--new-tokens", "3", "--batch-size", "2", "--prompt-tokens", "12", "--out", "half"]
    done = run([*argv, *options, *model_options], place, environment(cache))
    return Measured(done, place / "half", read_run(place / "half"))


@pytest.mark.slow
def test_a_failed_cell_is_a_row_and_the_next_is_measured(half_failed: Measured) -> None:
    assert half_failed.done.returncode == 1
    fp32, fp16 = half_failed.run.cells
    assert isinstance(fp32.outcome, Failed)
    assert fp32.outcome.traceback
    assert isinstance(fp16.outcome, Done)
    assert [(trial.batch_size, trial.prompt_tokens) for trial in fp16.trials] == [(2, 12)]
    assert "Traceback" not in half_failed.done.stderr
    assert "Traceback" in (half_failed.folder / "logs" / "fp32.log").read_text()


@pytest.mark.slow
def test_stdout_has_only_the_json(half_failed: Measured) -> None:
    summary = json.loads(half_failed.done.stdout)
    fp32, fp16 = summary["rows"]
    assert fp32["decode_tok_s"] is None
    assert fp32["reason"]
    assert fp16["decode_tok_s"] > 0
    assert fp16["reason"] is None
    assert any(note.startswith("fp32: ") for note in summary["notes"])


@pytest.mark.slow
def test_the_notes_say_why_a_row_is_empty(qbench: Qbench, half_failed: Measured) -> None:
    shown = qbench("report", half_failed.folder).stdout
    outcome = half_failed.run.cells[0].outcome
    assert isinstance(outcome, Failed)
    assert f"• fp32: {outcome.kind}: {outcome.message}" in shown
    (row,) = [line for line in shown.splitlines() if line.split()[:1] == ["fp32"]]
    assert set(row.split()[1:]) == {"–"}


@pytest.mark.slow
def test_modes_are_rows_and_verbose_shows_what_ran(
    golden: Golden, qbench: Qbench, lively: Path, tmp_path: Path
) -> None:
    options = ["-p", "fp16", "-p", "int8", "-m", str(lively), "--new-tokens", "6", "--depth", "0,8"]
    done = qbench("orchestrate", *options, "--decode", "generate,eager,graph", "--verbose", "--out", "run")
    assert done.returncode == 1  # a graph was requested, and there is no GPU
    table, notes = done.stdout.split("•", 1)
    table, best = table.split("best mode", 1)
    assert "tok/s, e" in best or "tok/s, g" in best
    rows = [line.split() for line in table.splitlines() if line.split()[:1] in (["fp16"], ["int8"])]
    shown = {(row[1], row[2]) for row in rows}
    assert shown == {(mode, depth) for mode in ("generate", "eager", "graph") for depth in ("0", "8")}
    golden(line for line in notes.splitlines() if "unsupported" in line or "unquantized" in line)
    assert "lm_head" in notes
    assert "llm_int8_threshold 6.0" in notes
    assert "GB/s" in notes
    again = qbench("report", "run", "--verbose")
    assert again.stdout == done.stdout
    cells = {
        (cell.precision, key_of(cell).name, cell.job.workload.depth): cell
        for cell in read_run(tmp_path / "run").cells
        if cell.job
    }
    assert len(cells) == 12
    refused = {name for name, cell in cells.items() if isinstance(cell.outcome, Failed)}
    graph = {
        ("fp16", "fp16 graph", 0),
        ("fp16", "fp16 graph", 8),
        ("int8", "int8 graph", 0),
        ("int8", "int8 graph", 8),
    }
    assert refused == graph | {("fp16", "fp16 generate", 8), ("int8", "int8 generate", 8)}
    assert {cells[name].outcome.kind for name in refused} == {"unsupported"}
    eager = cells["fp16", "fp16", 0]
    assert eager.warmed_up
    assert eager.loaded
    assert eager.loaded.costs
    assert eager.loaded.costs.linear_parameters == 294_912


HUNG_WORKER = '''\
# /// script
# requires-python = ">=3.11"
# dependencies = []
# [tool.qbench]
# precision = "hung"
# label = "Hung"
# bits_per_weight = 16
# devices = ["cpu"]
# ///
"""Never loads its model."""

import time

from workers.harness.main import main
from workers.protocol.backend import Backend

if __name__ == "__main__":
    main(Backend(lambda job: time.sleep(600)))
'''


@pytest.mark.slow
def test_a_timeout_is_a_row(golden: Golden, qbench: Qbench, model_options: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "hung.py").write_text(HUNG_WORKER)
    options = ["--workers", "mine", "-p", "hung", "--timeout", "5", "--out", "run"]
    done = qbench("orchestrate", *model_options, *options)
    assert done.returncode == 1
    (cell,) = read_run(tmp_path / "run").cells
    assert isinstance(cell.outcome, Failed)
    assert cell.outcome.kind == "timeout"
    golden(line for line in done.stdout.splitlines() if "timeout" in line)
    assert cell.edges  # from before the timeout


@pytest.mark.slow
def test_notes_name_what_the_budget_cut(
    golden: Golden, qbench: Qbench, model_options: list[str], tmp_path: Path
) -> None:
    """Imports alone exceed the budget: the first cell still has a figure, the second has none."""
    options = ["--budget", "0.01", "--new-tokens", "64", "--out", "run"]
    done = qbench("orchestrate", *P, "-p", "fp32", *model_options, *options)
    assert done.returncode == 0
    fp16, fp32 = read_run(tmp_path / "run").cells
    (trial,) = fp16.trials
    assert (trial.cut_short, trial.new_tokens) == (True, 9)
    assert isinstance(fp32.outcome, Skipped)
    notes = [line for line in done.stdout.splitlines() if "budget" in line]
    assert [note.split(":")[0].split()[-1] for note in notes] == ["fp16", "fp32"]
    golden(re.sub(r"its \d+ s", "its N s", note) for note in notes)


# Signals


def descendants(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def wait_until_ended(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Processes still alive after this time. A zombie has ended; its new parent will wait for it."""

    def alive() -> list[psutil.Process]:
        return [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]

    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s:
        try:
            if not alive():
                return []
        except psutil.NoSuchProcess:
            continue
        time.sleep(0.05)
    return alive()


def read_until(stream: IO[str], wanted: str) -> None:
    for line in stream:
        if wanted in line:
            return
    pytest.fail(f"{wanted!r} was never printed")


@contextmanager
def running(
    arguments: list[str], cwd: Path, cache: Path
) -> Iterator[tuple["subprocess.Popen[str]", list[psutil.Process]]]:
    """A run of three precisions whose second worker has started, and that worker's processes."""
    names = ["-p", "fp16", "-p", "fp32", "-p", "bf16"]
    process = subprocess.Popen(
        command("orchestrate", *names, "--new-tokens", "16", "--out", "run", *arguments),
        cwd=cwd,
        env=environment(cache, TMPDIR=str(cwd)),  # since a killed parent does not remove its links
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # The shell may have set SIGINT to be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    workers: list[psutil.Process] = []
    try:
        read_until(process.stderr, "[2/3] fp32: started")
        while not workers:
            workers = descendants(process)
        yield process, workers
    finally:
        for each in [*workers, process]:
            if each.is_running() if isinstance(each, psutil.Process) else each.poll() is None:
                each.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_the_workers_and_keeps_finished_cells(
    number: signal.Signals, model_options: list[str], tmp_path: Path, cache: Path
) -> None:
    with running(model_options, tmp_path, cache) as (process, workers):
        time.sleep(1)  # so that it is probably importing torch
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
        assert wait_until_ended(workers, 30) == []
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "interrupted; to continue: qbench-orchestrate --resume run"
    assert "Traceback" not in stderr
    (cell,) = read_run(tmp_path / "run").cells
    assert cell.precision == "fp16"
    assert isinstance(cell.outcome, Done)
    rows = [line.split()[0] for line in stdout.splitlines() if line.strip()]
    assert "fp16" in rows
    assert "fp32" not in rows


@pytest.mark.slow
def test_a_killed_parent_leaves_no_worker_and_a_readable_run(
    model_options: list[str], tmp_path: Path, cache: Path, qbench: Qbench
) -> None:
    with running(model_options, tmp_path, cache) as (process, workers):
        time.sleep(1)
        process.kill()
        process.wait()
        assert wait_until_ended(workers, 30) == []
    done = qbench("report", "run", "--format", "json")
    assert [row["precision"] for row in json.loads(done.stdout)["rows"]] == ["fp16"]


# On a terminal


@pytest.mark.slow
def test_a_terminal_has_a_live_line_without_colors_under_no_color(
    model_options: list[str], tmp_path: Path, cache: Path
) -> None:
    argv = command("orchestrate", *P, "--new-tokens", "2", "--out", "run", *model_options)
    env = environment(cache, NO_COLOR="1", TERM="xterm-256color", COLUMNS="120")
    status, shown = run_on_terminal(argv, tmp_path, env)
    assert status == 0
    assert re.search(r"\[1/1\] fp16 · \w+", shown)
    assert "RSS " in shown
    assert "1.00×" in shown
    assert ANY_ESCAPE in shown  # the live line is redrawn
    assert not re.search(COLOR, shown)


@pytest.mark.slow
@pytest.mark.parametrize("times_as_slow", [1, 137])
def test_a_report_fits_a_narrow_terminal(
    times_as_slow: int, measured: Measured, cache: Path, place: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(measured.folder, tmp_path / "run")
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    for trial in (trial for record in records if record["precision"] == "fp16" for trial in record["trials"]):
        trial["decode_s"] *= times_as_slow
        trial["token_s"] = [token_s * times_as_slow for token_s in trial["token_s"]]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    env = environment(cache, TERM="dumb", COLUMNS="80")
    status, shown = run_on_terminal(command("report", folder), place, env)
    assert status == 0
    title, *table = shown.replace("\r\n", "\n").split("•")[0].splitlines()
    assert title.startswith("tiny-llama on")
    assert max(map(len, table)) <= 80
    assert "…" not in shown
    (row,) = [line for line in table if line.split()[:1] == ["fp16"]]
    assert len(row.split()) == 10  # no column is omitted, and no figure is wrapped


@pytest.mark.slow
def test_a_report_on_a_terminal(measured: Measured, cache: Path, place: Path) -> None:
    for more in ({}, {"NO_COLOR": "1"}, {"TERM": "dumb"}):
        env = environment(cache, **({"TERM": "xterm-256color", "COLUMNS": "120"} | more))
        status, shown = run_on_terminal(command("report", measured.folder), place, env)
        assert status == 0
        assert "fp32" in shown
        if "NO_COLOR" in more:
            assert not re.search(COLOR, shown)
        if more.get("TERM") == "dumb":
            assert ANY_ESCAPE not in shown


# qbench-worker


@pytest.mark.slow
def test_a_worker_writes_frames_to_a_pipe(qbench: Qbench, model_options: list[str], tmp_path: Path) -> None:
    done = qbench("worker", "fp32", "--new-tokens", "3", "--warmup", "0", *model_options)
    assert done.returncode == 0
    decoder = msgspec.json.Decoder(AnyFrame)
    frames: list[AnyFrame] = [decoder.decode(line) for line in done.stdout.splitlines()]
    spoken = [frame for frame in frames if isinstance(frame, Phase | Ready | Loaded | Trial | Done)]
    assert [type(frame).__name__ for frame in spoken] == [
        "Phase", "Phase", "Ready", "Phase", "Loaded", "Phase", "Phase",
        *["Phase", "Phase", "Trial"] * 2, "Phase", "Phase", "Done",
    ]  # fmt: skip
    assert "Loading weights" in done.stderr  # its log goes to the terminal
    assert {path.name for path in tmp_path.iterdir()} == set()


@pytest.mark.slow
def test_a_worker_on_a_terminal_is_readable(model_options: list[str], tmp_path: Path, cache: Path) -> None:
    argv = command("worker", "fp32", "--new-tokens", "3", "--warmup", "0", *model_options)
    status, shown = run_on_terminal(argv, tmp_path, environment(cache, TERM="xterm"))
    assert status == 0
    lines = shown.replace("\r\n", "\n").splitlines()
    begin = [line.split()[0] for line in lines if re.match(r"(→|ready|loaded|trial|done)\s", line)]
    assert begin == ["→", "→", "ready", "→", "loaded", "→", "→", *["→", "→", "trial"] * 2, "→", "→", "done"]
    assert re.search(r"→ load +resident set [\d,]+ MiB", shown)
    assert '{"frame"' not in shown


@pytest.mark.slow
def test_a_worker_that_fails_exits_with_1(
    qbench: Qbench, model_options: list[str], half_failed: Measured
) -> None:
    corrupt = half_failed.folder.parent / "corrupt"
    done = qbench("worker", "fp32", *model_options, "--checkpoint", f"fp32={corrupt}")
    assert done.returncode == 1
    last = msgspec.json.decode(done.stdout.splitlines()[-1], type=AnyFrame)
    assert isinstance(last, Failed)
