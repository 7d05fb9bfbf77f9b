"""The Python that a worker runs under, and how it gets our packages.

A precision may need other versions of torch or transformers, so a worker's interpreter can be any Python,
and qbench need not be installed there. It is lent two packages, `workers` and `schemas`, through a folder of
two links on PYTHONPATH. Their actual folder on PYTHONPATH would expose the parent's whole site-packages if
qbench is installed there, and mix two environments. A third link adds the folder of a user's own workers, as
a package next to ours.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import msgspec
from packaging.utils import canonicalize_name

from orchestrator.errors import BadInput
from orchestrator.precisions.catalog import Precision

OLDEST_PYTHON = (3, 11)
"""The first with `-P`, which keeps the working directory off `sys.path`."""

ANSWER_TIMEOUT_S = 30

_OUR_ROOT = Path(__file__).resolve().parents[2]
_LENT = ("workers", "schemas")

# Each of these would point another interpreter at the parent's environment.
_PARENT_VARIABLES = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__"}

_QUESTION = """\
import json, platform
from importlib.metadata import distributions
found = [(each.metadata["Name"], each.version) for each in distributions()]
print(json.dumps({"python": platform.python_version(), "distributions": found}))
"""


class _Answer(msgspec.Struct, frozen=True):
    python: str
    distributions: list[tuple[str | None, str | None]]


@dataclass(frozen=True)
class Interpreter:
    """A Python that workers can run under."""

    path: str
    own: bool
    """Whether it is the parent's."""
    made: bool = False
    """Whether `--make-env` made its environment, for one precision."""

    def python_version(self) -> str:
        """Its version, e.g. `3.12.3`."""
        return platform.python_version() if self.own else _ask(self.path).python

    def installed(self) -> dict[str, str]:
        """Canonical distribution name → version, of everything that a worker could import."""
        if self.own:
            return _by_name((each.metadata["Name"], each.version) for each in metadata.distributions())
        return _by_name(_ask(self.path).distributions)

    def pip_command(self) -> str:
        """The command that installs into this interpreter, e.g. `.venv/bin/python -m pip install`."""
        if "pip" in self.installed():
            return shlex.join([self.path, "-m", "pip", "install"])
        return shlex.join(["uv", "pip", "install", "--python", self.path])


def forget_answers() -> None:
    """Discard the cached answers of interpreters, after packages were installed or removed."""
    _ask.cache_clear()


def own_interpreter() -> Interpreter:
    """The Python that runs the parent."""
    return Interpreter(sys.executable, own=True)


def find_interpreter(value: str) -> Interpreter:
    """Find the Python that `--python` names: a path, or a command on PATH.

    Raises `BadInput` if there is none, it isn't a Python, or it is older than 3.11.
    """
    command = shutil.which(os.path.expanduser(value))
    if command is None:
        raise BadInput("--python", value, "is not an executable program", _fix_for(value))
    path = os.path.abspath(command)  # links stay as they are: a venv's Python is one
    if path == sys.executable:
        return own_interpreter()
    _ask(path)
    return Interpreter(path, own=False)


@contextmanager
def lent_packages(precisions: Iterable[Precision] = ()) -> Iterator[Path]:
    """A folder that exists while workers run, with `workers`, `schemas`, and the packages of `precisions`."""
    lent = {precision.package: precision.path.parent for precision in precisions}
    lent |= {package: _OUR_ROOT / package for package in _LENT}
    with tempfile.TemporaryDirectory(prefix="qbench-") as folder:
        for package, source in lent.items():
            Path(folder, package).symlink_to(source, target_is_directory=True)
        yield Path(folder)


def worker_command(interpreter: Interpreter, module: str) -> list[str]:
    """The argv that starts a worker; `-P` so that a `workers/` in the working directory can't shadow ours."""
    return [interpreter.path, "-P", "-m", module]


def worker_environment(interpreter: Interpreter, lent: Path) -> dict[str, str]:
    """The environment variables a worker starts with; `lent` is the folder of `lent_packages`."""
    environment = dict(os.environ) if interpreter.own else independent_variables()
    # An empty entry would mean the working directory, and a relative one would depend on it.
    inherited = [
        os.path.abspath(path) for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path
    ]
    environment["PYTHONPATH"] = os.pathsep.join([str(lent), *inherited])
    environment["TOKENIZERS_PARALLELISM"] = "false"  # tokenizers would warn about the fork, and start threads
    # Containers often set this and ship no bytecode. Then every worker would compile everything that torch
    # and transformers import, which takes 12 s instead of 5 (two CPU cores).
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


def independent_variables() -> dict[str, str]:
    """The environment variables for a process that must not see the parent's Python environment."""
    return {name: value for name, value in os.environ.items() if name not in _PARENT_VARIABLES}


@cache
def _ask(path: str) -> _Answer:
    """Start another interpreter once, as a worker would be, and decode its version and packages."""
    # A variable instead of -P, which an older Python would reject before it could report its version.
    environment = independent_variables() | {"PYTHONSAFEPATH": "1"}
    try:
        done = subprocess.run(
            [path, "-c", _QUESTION],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=ANSWER_TIMEOUT_S,
        )
        # Only the last line: a sitecustomize may print before it.
        answer = msgspec.json.decode(done.stdout.strip().rpartition(b"\n")[2], type=_Answer)
    except subprocess.TimeoutExpired:
        raise _refused(path, f"did not answer within {ANSWER_TIMEOUT_S} s") from None
    except (OSError, msgspec.MsgspecError):
        raise _refused(path, "is not a working Python") from None
    if tuple(map(int, answer.python.split(".")[:2])) < OLDEST_PYTHON:
        raise _refused(path, f"is Python {answer.python}, and workers need 3.11")
    return answer


def _refused(path: str, problem: str) -> BadInput:
    return BadInput("--python", path, problem, "Name the Python of an environment with Python 3.11 or newer")


def _fix_for(value: str) -> str:
    inside = Path(value).expanduser() / "bin" / "python"
    if inside.exists():
        return f"Name the Python in that folder: {inside}"
    return "Name the path of a Python, e.g. an environment's bin/python"


def _by_name(distributions: Iterable[tuple[str | None, str | None]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, version in distributions:
        if name and version:  # a half-removed package has neither
            found.setdefault(canonicalize_name(name), version)  # the first on sys.path is the one imported
    return found
