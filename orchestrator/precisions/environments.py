"""Environments for single precisions: which precisions have one, and whether it still meets the header.

`qbench-worker --make-env NAME` makes one in the cache folder, and from then on the precision runs in it:

    environments/NAME/lock.txt    exact versions with hashes; kept when the environment is dropped
    environments/NAME/venv/       the environment, with a copy of the lock that it was installed from

The first line of a lock records its purpose, an `Origin`, so that a lock for another header isn't used.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

import msgspec
from packaging.specifiers import SpecifierSet

from orchestrator.errors import QbenchError
from orchestrator.precisions.availability import SCHEMAS_NEED
from orchestrator.precisions.catalog import USERS_PACKAGE, Precision
from orchestrator.precisions.interpreter import Interpreter, own_interpreter


class Origin(msgspec.Struct, kw_only=True):
    """What a lock was made for, recorded in its first line."""

    requirements: list[str]
    """Of the worker's header and of `schemas`, PEP 508 strings."""
    lock: str | None
    """Text of the lock that comes with the worker."""
    python: str
    """Version of its Python, e.g. `3.12.3`."""
    reused: list[str] = []
    """Packages of the parent's environment that it reuses, as `name==version`."""


@dataclass(frozen=True)
class Environment:
    """A finished environment in the cache; `outdated` is the reason why it isn't used, None if it is."""

    folder: Path
    outdated: str | None

    @property
    def interpreter(self) -> Interpreter:
        return interpreter_in(self.folder)


def interpreter_in(folder: Path) -> Interpreter:
    """The Python of the environment in `folder`."""
    return Interpreter(str(folder / "bin/python"), own=False, made=True)


def home_of(name: str, cache_folder: Path) -> Path:
    """The folder of a precision's environment and lock."""
    return cache_folder / "environments" / name


def worker_lock(precision: Precision) -> Path:
    """The path of the lock that a worker may come with."""
    return precision.path.parent / "locks" / f"{precision.name}.txt"


def find_environment(precision: Precision, cache_folder: Path) -> Environment | None:
    """The environment made for this precision, outdated or not; None if there is none."""
    folder = home_of(precision.name, cache_folder) / "venv"
    if not (folder / "lock.txt").exists():  # partly made, or partly removed
        return None
    return Environment(folder, _outdated(precision, folder))


def origin_of(precision: Precision, python_version: str) -> Origin:
    """What a lock for this precision must be made for."""
    path = worker_lock(precision)
    try:
        lock = path.read_text(encoding="utf-8") if path.exists() else None
    except (OSError, UnicodeDecodeError) as error:
        raise QbenchError(f"{path}: can't be read: {error}") from None
    requirements = [*precision.requirements, SCHEMAS_NEED]
    return Origin(requirements=requirements, lock=lock, python=python_version)


def outdated_lock(precision: Precision, lock: Path, python: str | None = None) -> str | None:
    """Why a lock in the cache can't be used for `precision`, or with another `python`; None if it can."""
    try:
        with lock.open("rb") as file:
            then = msgspec.json.decode(file.readline().removeprefix(b"# "), type=Origin)
    except (OSError, msgspec.MsgspecError):
        return "it was made by another version of qbench"
    allowed = SpecifierSet(precision.requires_python or "").contains(then.python, prereleases=True)
    if not allowed or python not in (None, then.python):
        return f"its Python is {then.python}"
    now = origin_of(precision, then.python)
    if now.requirements != then.requirements:
        return "the packages in its header changed"
    if now.lock != then.lock:
        return "the lock next to its worker changed"
    installed = {f"{name}=={version}" for name, version in own_interpreter().installed().items()}
    gone = sorted(set(then.reused) - installed)
    return f"qbench's environment no longer has {', '.join(gone)}" if gone else None


def make_command(precision: Precision) -> str:
    """The command that makes an environment for this precision."""
    workers = ["--workers", str(precision.path.parent)] if precision.package == USERS_PACKAGE else []
    return shlex.join(["qbench-worker", *workers, "--make-env", precision.name])


def outdated_line(precision: Precision, cache_folder: Path) -> str | None:
    """A line on why its environment is outdated, and how to renew it; None if it isn't outdated."""
    environment = find_environment(precision, cache_folder)
    if environment is None or environment.outdated is None:
        return None
    reason = f"its environment is outdated and not used ({environment.outdated})"
    return f"{precision.name}: {reason}: {make_command(precision)}"


def _outdated(precision: Precision, folder: Path) -> str | None:
    if not (folder / "bin/python").exists():  # a dangling link doesn't
        return "its Python is gone"
    return outdated_lock(precision, folder / "lock.txt")
