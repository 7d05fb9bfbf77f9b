"""A worker runs under the Python it was given, with our two packages and nothing else of the parent's."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from orchestrator.errors import BadInput
from orchestrator.precisions import interpreter as module
from orchestrator.precisions.interpreter import (
    Interpreter,
    find_interpreter,
    lent_packages,
    own_interpreter,
    worker_command,
    worker_environment,
)


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The python of a fresh environment that holds no package at all."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    return str(folder / "bin" / "python")


def program(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_the_parents_own_is_asked_without_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    own = find_interpreter(sys.executable)
    assert own == own_interpreter()
    assert own.installed()["msgspec"]
    assert "huggingface-hub" in own.installed()
    assert own.python_version() == ".".join(map(str, sys.version_info[:3]))


def test_another_is_asked_once_and_has_its_own_packages(
    bare_python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = next(Path(bare_python).parent.parent.glob("lib/python*/site-packages"))
    (site / "My_Package-1.5.dist-info").mkdir()
    (site / "My_Package-1.5.dist-info" / "METADATA").write_text("Name: My_Package\nVersion: 1.5\n")
    (site / "half_removed-1.dist-info").mkdir()
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(os.path.dirname(pytest.__file__)))
    other = find_interpreter(bare_python)
    assert not other.own
    assert other.path == bare_python
    assert other.installed() == {"my-package": "1.5"}
    monkeypatch.setattr(subprocess, "run", None)
    assert other.python_version() == ".".join(map(str, sys.version_info[:3]))


def test_a_folder_is_answered_with_the_python_inside_it(bare_python: str) -> None:
    folder = Path(bare_python).parent.parent
    with pytest.raises(BadInput, match=f"Name the Python in that folder: {bare_python}"):
        find_interpreter(str(folder))


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(BadInput, match="--python no/such/python: is no program that can be run"):
        find_interpreter("no/such/python")


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("#!/bin/sh\necho hello", "is not a Python that works"),
        ("#!/no/such/interpreter", "is not a Python that works"),
        ("#!/bin/sh\nsleep 5", "did not answer within 0.2 s"),
        (
            """#!/bin/sh\necho '{"python": "3.10.14", "distributions": []}'""",
            "is Python 3.10.14, and workers need 3.11",
        ),
    ],
)
def test_what_is_no_python_of_use_is_refused(
    script: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "sleep" in script:
        monkeypatch.setattr(module, "ANSWER_TIMEOUT_S", 0.2)
    with pytest.raises(BadInput, match=problem):
        find_interpreter(program(tmp_path / "python", script))


def test_lent_packages_are_ours_and_gone_afterwards() -> None:
    with lent_packages() as lent:
        assert sorted(os.listdir(lent)) == ["schemas", "workers"]
        assert (lent / "schemas" / "job.py").is_file()
        assert (lent / "workers" / "__init__.py").is_file()
    assert not lent.exists()
    assert Path(module.__file__).parents[2].joinpath("workers").is_dir()  # only the link was removed


def test_the_command_keeps_the_working_directory_out() -> None:
    command = worker_command(Interpreter("python3", own=False), "workers.fp16")
    assert command == ["python3", "-P", "-m", "workers.fp16"]


def test_another_interpreter_is_cut_loose_from_the_parents_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__"):
        monkeypatch.setenv(name, "of/the/parent")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    environment = worker_environment(Interpreter("python3", own=False), tmp_path)
    assert environment["PYTHONPATH"] == str(tmp_path)
    assert "of/the/parent" not in environment.values()
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"
    assert environment["TOKENIZERS_PARALLELISM"] == "false"


def test_our_own_keeps_the_inherited_path_but_not_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([".bundle", ""]))
    environment = worker_environment(own_interpreter(), Path("/lent"))
    assert environment["PYTHONPATH"] == os.pathsep.join(["/lent", str(tmp_path / ".bundle")])


def test_a_lent_worker_runs_under_a_bare_python_beside_the_users_own_folders(
    bare_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user stands in a folder with a `workers/` of their own; the bare Python has no site-packages."""
    for package in ("workers", "schemas"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('the user has met our import')")
    monkeypatch.chdir(tmp_path)
    other = find_interpreter(bare_python)
    probe = (
        "import importlib.util as u, json, sys, workers; find = lambda name: u.find_spec(name) is not None;"
        "print(json.dumps([workers.__file__, *map(find, ['schemas', 'orchestrator', 'msgspec', 'pytest'])]))"
    )
    with lent_packages() as lent:
        environment = worker_environment(other, lent)
        command = [*worker_command(other, "workers")[:2], "-c", probe]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        expected = [str(lent / "workers" / "__init__.py"), True, False, False, False]
    assert json.loads(done.stdout) == expected


def test_what_workers_import_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported.py").write_text("")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    environment = worker_environment(own_interpreter(), tmp_path)
    subprocess.run([sys.executable, "-c", "import imported"], env=environment, check=True)
    assert len(list(tmp_path.glob("__pycache__/imported.*.pyc"))) == 1
