"""A worker runs under its assigned Python, with our two packages and nothing else of the parent's."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from golden_text import Golden

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
    """The Python of a new environment without any package."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    return str(folder / "bin" / "python")


def program(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_the_parents_own_is_queried_without_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    own = find_interpreter(sys.executable)
    assert own == own_interpreter()
    assert own.installed()["msgspec"]
    assert "huggingface-hub" in own.installed()
    assert own.python_version() == ".".join(map(str, sys.version_info[:3]))


def test_another_is_queried_once_and_has_its_own_packages(
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


def test_for_a_folder_the_python_inside_it_is_suggested(bare_python: str) -> None:
    folder = Path(bare_python).parent.parent
    with pytest.raises(BadInput) as caught:
        find_interpreter(str(folder))
    assert caught.value.fix.endswith(f" {bare_python}")


def test_a_path_that_does_not_exist_is_refused(golden: Golden) -> None:
    with pytest.raises(BadInput) as caught:
        find_interpreter("no/such/python")
    golden(str(caught.value))


def test_the_install_command_is_pip_if_available_or_else_uv(bare_python: str, tmp_path: Path) -> None:
    assert find_interpreter(bare_python).pip_command() == f"uv pip install --python {bare_python}"
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = tmp_path.glob("venv/lib/python*/site-packages")
    (site / "pip-26.dist-info").mkdir()
    (site / "pip-26.dist-info/METADATA").write_text("Name: pip\nVersion: 26\n")
    python = str(tmp_path / "venv/bin/python")
    assert find_interpreter(python).pip_command() == f"{python} -m pip install"


@pytest.mark.parametrize(
    "script",
    [
        "#!/bin/sh\necho hello",
        "#!/no/such/interpreter",
        "#!/bin/sh\nexec tail -f /dev/null",
        """#!/bin/sh\necho '{"python": "3.10.14", "distributions": []}'""",
    ],
    ids=["not a Python", "not executable", "hangs", "too old"],
)
def test_an_unusable_python_is_refused(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: Golden
) -> None:
    if "tail" in script:  # it hangs
        monkeypatch.setattr(module, "ANSWER_TIMEOUT_S", 0.2)
    with pytest.raises(BadInput) as caught:
        find_interpreter(program(tmp_path / "python", script))
    assert caught.value.option == "--python"
    golden(caught.value.problem)


def test_lent_packages_are_ours_and_only_borrowed() -> None:
    with lent_packages() as lent:
        assert sorted(os.listdir(lent)) == ["schemas", "workers"]
        assert (lent / "schemas" / "job.py").is_file()
        assert (lent / "workers" / "__init__.py").is_file()
    assert not lent.exists()
    assert Path(module.__file__).parents[2].joinpath("workers").is_dir()  # only the link was removed


def test_the_command_keeps_the_working_directory_out() -> None:
    command = worker_command(Interpreter("python3", own=False), "workers.fp16")
    assert command == ["python3", "-P", "-m", "workers.fp16"]


def test_another_interpreter_does_not_see_the_parents_environment(
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


def test_the_parents_keeps_its_inherited_path_but_not_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([".bundle", ""]))
    environment = worker_environment(own_interpreter(), Path("/lent"))
    assert environment["PYTHONPATH"] == os.pathsep.join(["/lent", str(tmp_path / ".bundle")])


def test_a_lent_worker_runs_under_a_bare_python_despite_the_users_folders(
    bare_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The working directory has the user's own `workers/`; the bare Python has no site-packages."""
    for package in ("workers", "schemas"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('the wrong package was imported')")
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


def test_bytecode_of_imports_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported.py").write_text("")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    environment = worker_environment(own_interpreter(), tmp_path)
    subprocess.run([sys.executable, "-c", "import imported"], env=environment, check=True)
    assert len(list(tmp_path.glob("__pycache__/imported.*.pyc"))) == 1
