"""One command calibrates weights before a run, with the included text or the user's, and records which."""

import hashlib
import re
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
from golden_text import Golden, without_names
from hypothesis import given
from hypothesis import strategies as st
from worker_runs import copy_packages, cpu_job, run_worker

from orchestrator.records.store import read_run
from schemas.frames import Failed, Phase
from schemas.job import CalibrationText, Job
from workers.quantization.calibration_text import (
    BLOCK_TOKENS,
    MAX_SAMPLES,
    MIN_SAMPLES,
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
    """The tiny model calibrated twice with the same user's text, in a separate cache."""
    place = tmp_path_factory.mktemp("calibration")
    text, cache = place / "mine.txt", place / "cache"
    text.write_text((ROOT / "LICENSE").read_text()[:6000])
    options = ["--model", str(tiny_llama), "--device", "cpu", "--calibration", "mine.txt"]
    argv = command("worker", "awq", "--calibrate", *options)
    first, again = (run(argv, place, environment(cache)) for _ in range(2))
    return Calibrated(first, again, text, options, cache)


@pytest.mark.slow
def test_one_command_calibrates_and_prints_the_folder(golden: Golden, calibrated: Calibrated) -> None:
    done = calibrated.first
    assert done.returncode == 0, done.stderr
    golden(done.stderr)
    (folder,) = (calibrated.cache / "awq-packed").iterdir()
    assert str(folder) in done.stdout
    note = read_note(folder)
    sha256 = hashlib.sha256(calibrated.text.read_bytes()).hexdigest()
    assert note.text_sha256 == sha256
    assert all(fact in done.stdout for fact in ("mine.txt", sha256[:12], f"{note.samples} × 128 tokens"))
    shown = done.stdout.replace(str(folder), "FOLDER").replace(sha256[:12], "SHA256")
    golden(re.sub(r"made in .+? with", "made in N s with", shown))


@pytest.mark.slow
def test_calibrating_again_finds_the_result(golden: Golden, calibrated: Calibrated) -> None:
    first, again = calibrated.first, calibrated.again
    assert again.returncode == 0
    assert again.stderr == ""
    line, made = again.stdout.splitlines()
    assert made == first.stdout.splitlines()[1]
    golden(line.rpartition(" ")[0])


@pytest.mark.slow
def test_a_run_uses_what_was_calibrated_and_records_the_text(calibrated: Calibrated) -> None:
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
def test_a_text_that_is_too_short_is_one_line(
    golden: Golden, qbench: Qbench, tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("Too short. " * 20)
    options = ["--model", tiny_llama, "--device", "cpu", "--calibration", "short.txt"]
    done = qbench("worker", "awq", "--calibrate", *options)
    assert done.returncode == 1
    assert done.stdout == ""
    line = done.stderr.splitlines()[-1]
    log = line.rpartition(" ")[2]
    assert Path(log).is_file()
    assert line.startswith("error: ")
    assert str(MIN_SAMPLES) in line
    golden(line.replace(log, "LOG").replace(str(tmp_path), "FOLDER"))


RANDOM = ["--model", "random:qwen2.5-0.5b"]


BAD = {
    "needs none": ("worker", ["fp16", "--calibrate"], "--calibrate fp16: "),
    "random weights": ("worker", ["awq", "--calibrate", *RANDOM], "--calibrate awq: "),
    "checkpoint": ("worker", ["awq", "--calibrate", "--checkpoint", "awq=x"], "--checkpoint awq=x: "),
    "missing": ("worker", ["awq", "--calibrate", "--calibration", "absent"], "--calibration absent: "),
    "no precision": ("worker", ["--calibrate"], "PRECISION: "),
    "binary": ("orchestrate", ["-p", "awq", "--calibration", "binary"], "--calibration binary: "),
    "nothing to calibrate": ("orchestrate", ["-p", "fp16", "--calibration", "x"], "--calibration x: "),
    "a run with random weights": (
        "orchestrate", ["-p", "awq", *RANDOM, "--calibration", "x"], "--calibration x: ",
    ),
    "a run with a checkpoint": (
        "orchestrate", ["-p", "awq", "--checkpoint", "awq=x", "--calibration", "x"], "--calibration x: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("script", "arguments", "named"), BAD.values(), ids=BAD)
def test_calibration_is_refused_with_a_reason(
    golden: Golden, qbench: Qbench, tmp_path: Path, script: str, arguments: list[str], named: str
) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    done = qbench(script, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {named}")
    golden(without_names(line).replace(str(tmp_path), "FOLDER"))


IMPATIENT_WORKER = """
from workers.harness.main import main
from workers.protocol.backend import Backend

def is_prepared(job):
    raise FileNotFoundError("the converted model")

main(Backend(load=None, prepare=lambda job, report: None, is_prepared=is_prepared))
"""


@pytest.mark.slow
def test_calibrated_weights_are_looked_for_only_after_conversion(tmp_path: Path) -> None:
    """This model can't even be converted, so its calibrated weights must not be looked for."""
    lent = copy_packages(tmp_path / "lent")
    (lent / "workers" / "impatient.py").write_text(IMPATIENT_WORKER)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    job = cpu_job("impatient", tmp_path / "broken.gguf", tmp_path / "cache")
    run = run_worker(job, "workers.impatient", lent)
    assert [frame.name for frame in run.all(Phase)] == ["start", "prepare"]
    assert "the converted model" not in run.one(Failed).message
    assert "FileNotFoundError" not in run.log


# Samples


def letters(text: str) -> SimpleNamespace:
    """A tokenizer that makes every character a token."""
    return SimpleNamespace(input_ids=list(map(ord, text)))


def job_with(content: bytes, folder: str) -> Job:
    path = Path(folder, "text.txt")
    path.write_bytes(content)
    text = CalibrationText(path=str(path), sha256=hashlib.sha256(content).hexdigest())
    return msgspec.structs.replace(cpu_job("awq", Path(folder), Path(folder)), calibration=text)


@given(length=st.integers(MIN_SAMPLES * BLOCK_TOKENS, 40_000))
def test_samples_are_blocks_spread_over_the_text_in_order(length: int) -> None:
    text = "".join(chr(0x1000 + index) for index in range(length))  # every token encodes its position
    with tempfile.TemporaryDirectory() as folder:
        chosen = samples(job_with(text.encode(), folder), letters)  # type: ignore[arg-type]
    whole = length // BLOCK_TOKENS
    starts = [block[0] - 0x1000 for block in chosen]
    assert len(chosen) == min(whole, MAX_SAMPLES)
    assert all(start % BLOCK_TOKENS == 0 for start in starts)
    assert all(block == list(range(block[0], block[0] + BLOCK_TOKENS)) for block in chosen)
    gaps = {after - before for before, after in pairwise(starts)}
    assert max(gaps) - min(gaps) <= BLOCK_TOKENS
    assert starts[0] == 0
    assert starts[-1] >= (whole - 1) * BLOCK_TOKENS - max(gaps)


@given(length=st.integers(0, MIN_SAMPLES * BLOCK_TOKENS - 1))
def test_too_few_samples_are_refused(length: int) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.raises(ValueError, match=rf"\b{length // BLOCK_TOKENS} samples of {BLOCK_TOKENS} tokens"),
    ):
        samples(job_with(b"x" * length, folder), letters)  # type: ignore[arg-type]


def test_a_text_that_changed_during_the_run_is_refused(tmp_path: Path) -> None:
    job = job_with(b"x" * 5000, str(tmp_path))
    (tmp_path / "text.txt").write_bytes(b"y" * 5000)
    with pytest.raises(ValueError, match="changed"):
        samples(job, letters)  # type: ignore[arg-type]


def test_the_included_text_is_the_default(tmp_path: Path) -> None:
    job = cpu_job("awq", tmp_path, tmp_path)
    assert text_sha256(job) == hashlib.sha256(OWN_TEXT.read_bytes()).hexdigest()
    first = samples(job, letters)[0]  # type: ignore[arg-type]
    assert OWN_TEXT.read_text().startswith("".join(map(chr, first)))
