"""A worker file in a user's folder is a precision, without changes to the project."""

import re
import subprocess
from pathlib import Path

import msgspec
import pytest
from commands import command, environment, run
from conftest import Qbench
from golden_text import Golden

from orchestrator.precisions.catalog import WORKERS_FOLDER
from orchestrator.records.store import read_run
from schemas.frames import AnyFrame, Done, Ready

# The documented example, plus what a user may add: a second module next to it, and a preparation, which runs
# in a separate process.
WORKER = '''\
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "jinja2; sys_platform == 'linux'", "pywin32; sys_platform == 'win32'"]
# [tool.qbench]
# precision = "mine"
# label = "My own"
# bits_per_weight = 31
# devices = ["cpu", "cuda"]
# ///
"""My own: as many bits as I like."""

from pathlib import Path

from schemas.job import Job
from workers.protocol.backend import Backend, LoadedModel, Report
from workers.harness.main import main

from .my_settings import DTYPE


def made(job: Job) -> Path:
    return Path(job.cache_folder, "mine.txt")


def is_prepared(job: Job) -> bool:
    return made(job).exists()


def prepare(job: Job, report: Report) -> None:
    report("preparing mine", 1, 1)
    made(job).parent.mkdir(parents=True, exist_ok=True)
    made(job).write_text("prepared")


def load(job: Job) -> LoadedModel:
    import torch

    from workers.models.transformers_model import load_transformers_model

    assert made(job).read_text() == "prepared"
    return load_transformers_model(job, getattr(torch, DTYPE))


if __name__ == "__main__":
    main(Backend(load, prepare, is_prepared))
'''


def write_worker(folder: Path, file: str = "fp32.py", **changes: str) -> Path:
    """Write WORKER and its second module, each key of `changes` replaced by its value.

    The file has the same name as one of ours, which must not matter.
    """
    text = WORKER
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    folder.mkdir(exist_ok=True)
    (folder / file).write_text(text)
    (folder / "my_settings.py").write_text('DTYPE = "float32"\n')
    return folder


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    return write_worker(tmp_path / "my workers")


@pytest.mark.parametrize("script", ["orchestrate", "worker"])
def test_it_is_listed_among_ours_by_its_bits(qbench: Qbench, script: str, mine: Path) -> None:
    done = qbench(script, "--workers", mine.name, "--list")
    assert done.returncode == 0, done.stderr
    first_words = [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
    assert first_words.index("fp32") < first_words.index("mine") < first_words.index("fp16")
    assert "My own: as many bits as I like." in " ".join(done.stdout.split())


def test_without_the_option_it_is_unknown(qbench: Qbench, mine: Path, tmp_path: Path) -> None:
    line = error_line(qbench("orchestrate", "-p", "mine"), tmp_path)
    assert line.startswith("error: --precision mine: ")


BAD = {
    "a name of ours": {'"mine"': '"int8"'},
    "a name that is a path": {'"mine"': '"../mine"'},
    "not PEP 508": {'"torch>=2.6"': '"torch>>2.6"'},
    "a table of another shape": {"[tool.qbench]": "[[tool.qbench]]"},
    "not a version": {'">=3.11"': '"new"'},
    "a missing field": {'# label = "My own"\n': ""},
    "not Python": {"def load(": "def load(("},
}


def error_line(done: "subprocess.CompletedProcess[str]", place: Path) -> str:
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return own_words(line.replace(str(place), "PLACE"))


def own_words(line: str) -> str:
    """The line without the messages of Python and packaging, whose wording depends on the version."""
    return re.sub(r"(is not Python|can't be read|block): (?!Expected `|Invalid specifier).*", r"\1: …", line)


@pytest.mark.parametrize("changes", BAD.values(), ids=BAD)
def test_an_invalid_header(qbench: Qbench, tmp_path: Path, changes: dict[str, str], golden: Golden) -> None:
    folder = write_worker(tmp_path / "bad", **changes)
    for arguments in (["-p", "fp16"], ["--list"]):
        line = error_line(qbench("orchestrate", "--workers", folder, *arguments), tmp_path)
        assert "PLACE/bad/fp32.py" in line
    golden(line)


def test_a_file_that_cant_be_imported_or_read(qbench: Qbench, tmp_path: Path, golden: Golden) -> None:
    dotted = write_worker(tmp_path / "dotted", "int4.v2.py")
    golden(error_line(qbench("worker", "--workers", dotted, "mine"), tmp_path))
    (dotted / "latin.py").write_bytes(b"# \xe9\n")
    (dotted / "int4.v2.py").unlink()
    golden(error_line(qbench("worker", "--workers", dotted, "mine"), tmp_path))


def test_two_files_cant_share_a_precision_name(
    qbench: Qbench, mine: Path, tmp_path: Path, golden: Golden
) -> None:
    write_worker(mine, "other.py")
    golden(error_line(qbench("worker", "--workers", mine, "mine"), tmp_path))


def test_an_unusable_folder(qbench: Qbench, mine: Path, tmp_path: Path, golden: Golden) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("absent", "my workers/fp32.py", "empty"):
        golden(error_line(qbench("orchestrate", "--workers", folder, "-p", "mine"), tmp_path))
    ours = qbench("orchestrate", "--workers", WORKERS_FOLDER, "-p", "mine")
    assert error_line(ours, tmp_path).startswith(f"error: --workers {WORKERS_FOLDER}/")


@pytest.mark.slow
def test_it_runs_next_to_ours(mine: Path, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Why is the sky blue?\nName a river.\n")
    options = ["--workers", mine, "-p", "mine", "-p", "fp32", "-m", tiny_llama, "--new-tokens", "10"]
    options += ["--prompts", "prompts.txt", "--device", "cpu", "--out", "run"]
    cache = tmp_path / "cache"
    done = run(command("orchestrate", *map(str, options)), tmp_path, environment(cache))
    assert done.returncode == 0, done.stdout + done.stderr
    own, ours = read_run(tmp_path / "run").cells
    assert (own.precision, own.label, own.bits_per_weight) == ("mine", "My own", 31)
    assert isinstance(own.outcome, Done), own.outcome
    assert [trial.token_ids for trial in own.trials] == [trial.token_ids for trial in ours.trials]
    assert (cache / "mine.txt").read_text() == "prepared"
    assert own.ready
    assert set(own.ready.versions) == {
        "torch",
        "transformers",
        "jinja2",
    }  # used for measuring, even if the header omits them


@pytest.mark.slow
def test_it_runs_by_hand(qbench: Qbench, mine: Path, tiny_llama: Path) -> None:
    done = qbench(
        "worker", "mine", "--workers", mine, "-m", tiny_llama, "--new-tokens", "2", "--device", "cpu"
    )
    assert done.returncode == 0, done.stderr
    frames = msgspec.json.Decoder(AnyFrame).decode_lines(done.stdout)
    assert isinstance(frames[-1], Done)
    assert any(isinstance(frame, Ready) for frame in frames)
