"""Environments of their own: which precision has one, and whether it still is what its worker asks for.

`qbench-worker --make-env NAME` makes one in the cache folder, and from then on the precision runs under it:

    environments/NAME/KEY.txt     the lock it was installed from
    environments/NAME/KEY/        venv/, borrowed/, and, written last, its blueprint

KEY stands for all that decides what is in it, the blueprint, so that an environment made for another header
is never taken for it; and a folder without a blueprint was not finished, and is none.
"""

import hashlib
import shlex
from dataclasses import dataclass
from pathlib import Path

import msgspec
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from orchestrator.precisions.availability import SCHEMAS_NEED
from orchestrator.precisions.borrowing import Borrowed, find_borrowable
from orchestrator.precisions.catalog import USERS_PACKAGE, Precision
from orchestrator.precisions.interpreter import Interpreter, own_interpreter
from orchestrator.precisions.locks import pinned, read_lock_beside

BLUEPRINT = "blueprint.json"


class Blueprint(msgspec.Struct, frozen=True, kw_only=True):
    """All that decides what an environment holds."""

    requirements: list[str]
    """Of the worker's header and of `schemas`, PEP 508 strings."""
    lock: str | None
    """Text of the lock that came with the worker."""
    python: str
    """Version of its Python, e.g. `3.12.3`."""
    borrowed: list[str]
    """What it has by links from the parent's environment, as `name==version`."""

    def key(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]


@dataclass(frozen=True)
class Environment:
    """A finished environment in the cache; `outdated` tells why it isn't used, None if it is."""

    folder: Path
    outdated: str | None

    @property
    def interpreter(self) -> Interpreter:
        return Interpreter(str(python_in(self.folder)), own=False, made=True)


def environments_folder(cache_folder: Path) -> Path:
    """Where the environments lie, in a folder for each precision."""
    return cache_folder / "environments"


def python_in(folder: Path) -> Path:
    """The Python of the environment in `folder`."""
    return folder / "venv" / "bin" / "python"


def find_environment(precision: Precision, cache_folder: Path) -> Environment | None:
    """The environment made for this precision, one of use before one that is out of date; None without."""
    markers = environments_folder(cache_folder).glob(f"{precision.name}/*/{BLUEPRINT}")
    found = [Environment(marker.parent, _outdated(precision, marker)) for marker in markers]
    return min(found, key=lambda each: each.outdated is not None, default=None)


def draw_blueprint(precision: Precision, python_version: str) -> tuple[Blueprint, Borrowed]:
    """What an environment for this precision is to hold, and those of its packages that are borrowed."""
    requirements = [*precision.requirements, SCHEMAS_NEED]
    lock = read_lock_beside(precision)
    # The need of schemas in any case: a lock made from the header alone doesn't know of it.
    wanted = map(Requirement, requirements) if lock is None else [*pinned(lock), Requirement(SCHEMAS_NEED)]
    own_version = own_interpreter().python_version()
    borrowed = find_borrowable(wanted) if _minor(python_version) == _minor(own_version) else {}
    blueprint = Blueprint(
        requirements=requirements,
        lock=lock,
        python=python_version,
        borrowed=sorted(f"{name}=={found.version}" for name, found in borrowed.items()),
    )
    return blueprint, borrowed


def make_command(precision: Precision) -> str:
    """What to type for an environment of its own."""
    workers = ["--workers", str(precision.path.parent)] if precision.package == USERS_PACKAGE else []
    return shlex.join(["qbench-worker", *workers, "--make-env", precision.name])


def outdated_line(precision: Precision, cache_folder: Path) -> str | None:
    """That an environment was made, why it isn't used, and what helps; None where nothing is to be said."""
    environment = find_environment(precision, cache_folder)
    if environment is None or environment.outdated is None:
        return None
    return (
        f"{precision.name}: its environment is out of date and not used ({environment.outdated}): "
        f"{make_command(precision)}"
    )


def _outdated(precision: Precision, marker: Path) -> str | None:
    try:
        then = msgspec.json.decode(marker.read_bytes(), type=Blueprint)
    except msgspec.MsgspecError:
        return "it was made by another version of qbench"
    if not python_in(marker.parent).exists():  # as a link to what is no longer there doesn't
        return "its Python is gone"
    if not SpecifierSet(precision.requires_python or "").contains(then.python, prereleases=True):
        return f"its Python is {then.python}"
    now, _ = draw_blueprint(precision, then.python)
    if now.requirements != then.requirements:
        return "the packages in its header changed"
    if now.lock != then.lock:
        return "the lock beside its worker changed"
    gone = set(then.borrowed) - set(now.borrowed)
    return f"it borrowed what is no longer so: {', '.join(sorted(gone))}" if gone else None


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
