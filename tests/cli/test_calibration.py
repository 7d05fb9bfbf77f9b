"""Weights are calibrated ahead of a run by one command, with our text or the user's, and say with which."""

import hashlib
import subprocess
import tempfile
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import msgspec
import pytest
from commands import command, environment, run
from conftest import ROOT, Qbench
from hypothesis import given
from hypothesis import strategies as st
from worker_runs import make_job

from orchestrator.records.store import read_run
from schemas.job import CalibrationText, Job
from workers.harness.main import SetupStep, _phases_to_do
from workers.quantization.calibration_text import (
    BLOCK_TOKENS,
    FEWEST_SAMPLES,
    MOST_SAMPLES,
    OWN_TEXT,
    read_note,
    samples,
    text_sha256,
)

# The command


class Calibrated(NamedTuple):
    first: subprocess.CompletedProcess[str]
    again: subprocess.CompletedProcess[str]
    text: Path
    options: list[str]
    cache: Path


@pytest.fixture(scope="module")
def calibrated(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    """The tiny model calibrated twice with the same text of the user's, in a cache of its own."""
    place = tmp_path_factory.mktemp("calibration")
    text, cache = place / "mine.txt", place / "cache"
    text.write_text((ROOT / "LICENSE").read_text()[:6000])
    options = ["--model", str(tiny_llama), "--device", "cpu", "--calibration", "mine.txt"]
    argv = command("worker", "awq", "--calibrate", *options)
    first, again = (run(argv, place, environment(cache)) for _ in range(2))
    return Calibrated(first, again, text, options, cache)


@pytest.mark.slow
def test_one_command_calibrates_and_says_where_the_result_lies(calibrated: Calibrated) -> None:
    done = calibrated.first
    assert done.returncode == 0, done.stderr
    acts = ("calibrating", "packing")
    begun, *layers = done.stderr.splitlines()
    assert begun == "awq: preparing weights, once for this model"
    assert layers == [f"{act} layer {layer} of 2" for act in acts for layer in (1, 2)]
    where, with_what = done.stdout.splitlines()
    folder = Path(where.removeprefix("awq: calibrated weights of tiny-llama saved to "))
    assert folder.parent == calibrated.cache / "awq-packed"
    note = read_note(folder)
    sha256 = hashlib.sha256(calibrated.text.read_bytes()).hexdigest()
    assert note.text_sha256 == sha256
    assert f"with mine.txt (sha256 {sha256[:12]}), {note.samples} × 128 tokens, groups of 128" in with_what
    assert with_what.startswith("made in ")


@pytest.mark.slow
def test_the_second_time_it_says_that_all_is_there(calibrated: Calibrated) -> None:
    first, again = calibrated.first, calibrated.again
    assert again.returncode == 0
    assert again.stderr == ""
    assert again.stdout == first.stdout.replace("saved to", "already in")


@pytest.mark.slow
def test_a_run_takes_what_was_calibrated_and_records_the_text(calibrated: Calibrated) -> None:
    argv = command("orchestrate", "-p", "fp16", "-p", "awq", *calibrated.options, "--new-tokens", "2")
    place = calibrated.text.parent
    done = run([*argv, "--verbose", "--out", "run"], place, environment(calibrated.cache))
    assert done.returncode == 0, done.stderr
    fp16, awq = read_run(place / "run").cells
    assert "prepare" not in [edge.phase.name for edge in awq.edges]
    sha256 = hashlib.sha256(calibrated.text.read_bytes()).hexdigest()
    assert awq.job
    assert awq.job.calibration == CalibrationText(path=str(calibrated.text), sha256=sha256)
    assert awq.loaded
    assert awq.loaded.settings["calibration"].startswith(f"mine.txt (sha256 {sha256[:12]}), ")
    assert f"calibration mine.txt (sha256 {sha256[:12]})" in " ".join(done.stdout.split())
    assert fp16.job
    assert fp16.job.calibration is None


@pytest.mark.slow
def test_too_short_a_text_is_one_line(qbench: Qbench, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short. " * 20)
    options = ["--model", tiny_llama, "--device", "cpu", "--calibration", "short.txt"]
    done = qbench("worker", "awq", "--calibrate", *options)
    assert done.returncode == 1
    assert done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: the calibration text ")
    assert f"samples of 128 tokens, fewer than {FEWEST_SAMPLES}" in line
    assert Path(line.rpartition(" ")[2]).is_file()  # the log


RANDOM = ["--model", "random:qwen2.5-0.5b"]


@pytest.mark.parametrize(
    ("script", "arguments", "named", "fix"),
    [
        ("worker", ["fp16", "--calibrate"], "--calibrate fp16: this precision needs no", "Those that do: "),
        ("worker", ["awq", "--calibrate", *RANDOM], "random weights are not calibrated", "Name a --model"),
        ("worker", ["awq", "--calibrate", "--checkpoint", "awq=x"], "--checkpoint awq=x", "Leave it or"),
        ("worker", ["awq", "--calibrate", "--calibration", "absent"], "--calibration absent: can't", "UTF-8"),
        ("worker", ["--calibrate"], "PRECISION: is missing", "Name one of"),
        ("orchestrate", ["-p", "awq", "--calibration", "binary"], "--calibration binary: can't", "UTF-8"),
        ("orchestrate", ["-p", "fp16", "--calibration", "x"], "--calibration x: fp16: not", "Leave it out"),
        ("orchestrate", ["-p", "awq", *RANDOM, "--calibration", "x"], "random weights", "Leave it out, or"),
        (
            "orchestrate",
            ["-p", "awq", "--checkpoint", "awq=x", "--calibration", "x"],
            "--calibration x: awq: not",
            "Leave it out",
        ),
    ],
)
def test_what_can_not_be_calibrated(
    script: str, arguments: list[str], named: str, fix: str, qbench: Qbench, tmp_path: Path
) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    done = qbench(script, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert named in line
    assert fix in line


def test_weights_are_not_looked_for_before_their_model_is_converted(tmp_path: Path) -> None:
    def looked(job: Job) -> bool:
        raise FileNotFoundError

    errands = [SetupStep("prepare", None, lambda job: False), SetupStep("prepare", None, looked)]
    assert _phases_to_do(errands, make_job("awq", tmp_path, tmp_path)) == ["prepare"]


# Samples


def letters(text: str) -> SimpleNamespace:
    """A tokenizer for which every character is a token."""
    return SimpleNamespace(input_ids=list(map(ord, text)))


def job_with(content: bytes, folder: str) -> Job:
    path = Path(folder, "text.txt")
    path.write_bytes(content)
    text = CalibrationText(path=str(path), sha256=hashlib.sha256(content).hexdigest())
    return msgspec.structs.replace(make_job("awq", Path(folder), Path(folder)), calibration=text)


@given(length=st.integers(FEWEST_SAMPLES * BLOCK_TOKENS, 40_000))
def test_samples_are_blocks_of_the_text_in_order_and_over_all_of_it(length: int) -> None:
    text = "".join(chr(0x1000 + index) for index in range(length))  # every token tells where it stood
    with tempfile.TemporaryDirectory() as folder:
        taken = samples(job_with(text.encode(), folder), letters)  # type: ignore[arg-type]
    whole = length // BLOCK_TOKENS
    starts = [block[0] - 0x1000 for block in taken]
    assert len(taken) == min(whole, MOST_SAMPLES)
    assert all(start % BLOCK_TOKENS == 0 for start in starts)
    assert all(block == list(range(block[0], block[0] + BLOCK_TOKENS)) for block in taken)
    gaps = {after - before for before, after in pairwise(starts)}
    assert max(gaps) - min(gaps) <= BLOCK_TOKENS
    assert starts[0] == 0
    assert starts[-1] >= (whole - 1) * BLOCK_TOKENS - max(gaps)


@given(length=st.integers(0, FEWEST_SAMPLES * BLOCK_TOKENS - 1))
def test_fewer_samples_than_the_fewest_are_refused(length: int) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.raises(ValueError, match=f"gives {length // BLOCK_TOKENS} samples of 128 tokens"),
    ):
        samples(job_with(b"x" * length, folder), letters)  # type: ignore[arg-type]


def test_a_text_that_was_changed_meanwhile_is_refused(tmp_path: Path) -> None:
    job = job_with(b"x" * 5000, str(tmp_path))
    (tmp_path / "text.txt").write_bytes(b"y" * 5000)
    with pytest.raises(ValueError, match="was changed meanwhile"):
        samples(job, letters)  # type: ignore[arg-type]


def test_our_own_text_is_the_default(tmp_path: Path) -> None:
    job = make_job("awq", tmp_path, tmp_path)
    assert text_sha256(job) == hashlib.sha256(OWN_TEXT.read_bytes()).hexdigest()
    first = samples(job, letters)[0]  # type: ignore[arg-type]
    assert OWN_TEXT.read_text().startswith("".join(map(chr, first)))
