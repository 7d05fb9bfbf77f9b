"""What all five commands share: `-h`, `--version`, and one line about unexpected errors."""

import inspect
import os
import re
import subprocess
import tomllib
from pathlib import Path

import click
import pytest
from commands import command
from conftest import ROOT, Qbench
from golden_text import Golden

import orchestrator
from orchestrator.cli.compare import compare
from orchestrator.cli.memory import show_memory
from orchestrator.cli.orchestrate import orchestrate
from orchestrator.cli.report import report
from orchestrator.cli.worker import work

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = [script.removeprefix("qbench-") for script in PROJECT["scripts"]]
ISSUES = PROJECT["urls"]["Issues"]

# Arguments with which each command calls a function that `break_everything` breaks.
CALLS = {
    "orchestrate": ["--list"],
    "worker": ["--list"],
    "memory": ["run"],
    "report": ["run"],
    "compare": ["run"],
}


def test_every_command_is_tested_here() -> None:
    assert sorted(CALLS) == sorted(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_short_and_long(qbench: Qbench, script: str) -> None:
    short, long = (qbench(script, option) for option in ("-h", "--help"))
    assert long.returncode == 0
    assert long.stdout.startswith(f"Usage: qbench-{script} ")
    assert long.stderr == ""
    assert (short.returncode, short.stdout, short.stderr) == (0, long.stdout, "")
    for option in ("--version", "--debug", "-h, --help"):
        assert option in long.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_version(qbench: Qbench, script: str) -> None:
    done = qbench(script, "--version")
    assert done.returncode == 0
    assert done.stdout == f"qbench-{script}, version {orchestrator.__version__}\n"


RECORDED = "results/h100-precisions-7b"


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("orchestrate", ["--list"]),
        ("worker", ["--list"]),
        ("memory", [RECORDED]),
        ("report", [RECORDED]),
        ("compare", ["--history", "results"]),
    ],
)
def test_a_reader_that_has_read_enough_is_no_failure(script: str, arguments: list[str]) -> None:
    """As `qbench-report RUN | head -n 1` with `set -o pipefail`."""
    process = subprocess.Popen(
        command(script, *arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


@pytest.mark.parametrize("command", [orchestrate, work, show_memory, report, compare], ids=str)
def test_help_texts(golden: Golden, command: click.Command) -> None:
    golden(inspect.cleandoc(command.help or ""))
    golden(
        f"{' '.join(option.opts)}: {option.help}"
        for option in command.params
        if isinstance(option, click.Option)
    )


# Unexpected errors


@pytest.fixture
def break_everything(tmp_path: Path) -> dict[str, str]:
    """Environment variables under which the commands fail with an error that isn't due to input."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sitecustomize.py").write_text(
        "import os\n"
        "from orchestrator.precisions import catalog\n"
        "from orchestrator.records import store\n"
        "def broken(*arguments, **options):\n"
        "    raise ZeroDivisionError('two\\nlines')\n"
        "catalog.find_all_precisions = store.read_run = store.read_records = broken\n"
    )
    inherited = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path / "broken"), inherited]))}


def log_named_in(done: "subprocess.CompletedProcess[str]") -> Path:
    assert done.returncode == os.EX_SOFTWARE == 70
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    (log,) = re.findall(r"/\S+\.log", line)
    assert ISSUES in line
    return Path(log)


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unexpected_error_is_one_line_and_a_log(
    qbench: Qbench, break_everything: dict[str, str], cache: Path, script: str
) -> None:
    done = qbench(script, *CALLS[script], env=break_everything)
    log = log_named_in(done)
    assert log.parent == cache / "logs"
    text = log.read_text()
    assert "Traceback (most recent call last)" in text
    assert "ZeroDivisionError: two\nlines" in text
    assert f"qbench-{script} {' '.join(CALLS[script])}\n" in text.splitlines(keepends=True)[0]
    assert orchestrator.__version__ in text.splitlines()[1]


def test_each_error_has_its_own_log(golden: Golden, qbench: Qbench, break_everything: dict[str, str]) -> None:
    first, second = (qbench("report", "run", env=break_everything) for _ in range(2))
    assert log_named_in(first) != log_named_in(second)
    golden(first.stderr.replace(str(log_named_in(first)), "LOG"))


def test_without_a_cache_folder_the_log_is_in_the_temporary_folder(
    qbench: Qbench, break_everything: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    places = {"QBENCH_CACHE": str(tmp_path / "file"), "TMPDIR": str(tmp_path / "tmp")}
    log = log_named_in(qbench("report", "run", env=break_everything | places))
    assert log.parent == tmp_path / "tmp"


@pytest.mark.parametrize("script", SCRIPTS)
def test_debug_shows_the_traceback_instead(
    qbench: Qbench, break_everything: dict[str, str], tmp_path: Path, script: str
) -> None:
    places = {"QBENCH_CACHE": str(tmp_path / "cache")}
    done = qbench(script, *CALLS[script], "--debug", env=break_everything | places)
    assert (done.returncode, done.stdout) == (70, "")
    assert done.stderr.startswith("Traceback (most recent call last)")
    assert done.stderr.splitlines()[-2:] == ["ZeroDivisionError: two", "lines"]
    assert not (tmp_path / "cache").exists()


def test_bad_input_is_not_an_internal_error(qbench: Qbench) -> None:
    plain, debugged = qbench("report", "absent"), qbench("report", "absent", "--debug")
    assert (plain.returncode, debugged.returncode) == (2, 2)
    assert debugged.stderr == plain.stderr
