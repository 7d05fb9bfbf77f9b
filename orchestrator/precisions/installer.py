"""`--make-env` and `--drop-env`: environments of their own, made and removed.

pip resolves what a worker's header asks for, in sight of what is borrowed, and its report becomes a lock.
Then that lock is installed, by uv where it is on PATH, else by pip, with every archive checked against its
hash, the first time too. pip is the parent's, with its user's settings for indexes and proxies, so the new
environment needs none. It counts as one when its blueprint is written, which is done last.
"""

import fcntl
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import msgspec
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from orchestrator.errors import BadInput
from orchestrator.precisions.availability import CPU_TORCH_INDEX, unmet_needs
from orchestrator.precisions.borrowing import Borrowed, link_borrowed
from orchestrator.precisions.catalog import Precision
from orchestrator.precisions.environments import (
    BLUEPRINT,
    Blueprint,
    draw_blueprint,
    environments_folder,
    find_environment,
    python_in,
)
from orchestrator.precisions.installer_process import InstallerFailed, run_installer
from orchestrator.precisions.interpreter import (
    Interpreter,
    ask_anew,
    find_interpreter,
    own_interpreter,
)
from orchestrator.precisions.locks import lock_beside, lock_of_report, pinned, without_borrowed

PYTHONS = ("python3.14", "python3.13", "python3.12", "python3.11")
"""Commands that are tried where a header does not allow the parent's own Python."""


def make_environment(precision: Precision, cache_folder: Path, device: str) -> str:
    """Make an environment for `precision`, unless it has one of use; a line that tells where it is.

    What installers print goes to stderr. Raises `BadInput` where one fails; of a new environment nothing is
    left then, but for the lock.
    """
    environment = find_environment(precision, cache_folder)
    if environment and environment.outdated is None and _is_whole(precision, environment.interpreter):
        return f"{precision.name} has an environment of its own: {environment.folder}"
    python = _find_python(precision)
    blueprint, borrowed = draw_blueprint(precision, python.python_version())
    home = environments_folder(cache_folder) / precision.name
    folder = home / blueprint.key()
    with _reserved(home, "--make-env"):
        click.echo(f"making an environment for {precision.name}: {folder}", err=True)
        _remove(folder)
        try:
            _make_venv(folder, precision, python, borrowed)
            _install(_keep_lock(folder, precision, blueprint, borrowed, device), folder, precision, device)
            _write_whole(folder / BLUEPRINT, msgspec.json.encode(blueprint))
        except BaseException:
            _remove(folder)
            raise
        _remove_others(folder)
    return f"{precision.name} has an environment of its own: {folder}"


def drop_environment(name: str, cache_folder: Path) -> str:
    """Remove the environment of a precision, whose worker may be gone already; a line that says so.

    Its lock is kept. Raises `BadInput` where there is nothing to remove.
    """
    homes = {folder.parent.name: folder.parent for folder in environments_folder(cache_folder).glob("*/*/")}
    if name not in homes:
        fix = f"These have one: {', '.join(sorted(homes))}" if homes else "No precision has one"
        raise BadInput("--drop-env", name, "has no environment of its own", fix)
    with _reserved(homes[name], "--drop-env"):
        for folder in homes[name].glob("*/"):
            _remove(folder)
    locks = ", ".join(sorted(str(lock) for lock in homes[name].glob("*.txt")))
    return f"{name} has no environment of its own any more" + (
        f"; its lock is kept: {locks}" if locks else ""
    )


@contextmanager
def _reserved(home: Path, option: str) -> Iterator[None]:
    """Keep others from making or removing environments of this precision meanwhile."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        with (home / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
    except BlockingIOError:
        problem = "its environment is being made or removed by another process"
        raise BadInput(option, home.name, problem, "Wait for that to end") from None
    except OSError as error:
        problem = f"{home} can't be used: {error.strerror or error}"
        raise BadInput(option, home.name, problem, "Set QBENCH_CACHE to another folder") from error


def _find_python(precision: Precision) -> Interpreter:
    """The parent's own Python if the header allows it, else the newest on PATH that it allows."""
    allowed = SpecifierSet(precision.requires_python or "")
    for python in _pythons():
        if allowed.contains(python.python_version(), prereleases=True):
            return python
    problem = f"its header wants Python {allowed}, and there is none here"
    raise BadInput("--make-env", precision.name, problem, "Install one, so that it is on PATH")


def _pythons() -> Iterator[Interpreter]:
    yield own_interpreter()
    for command in filter(shutil.which, PYTHONS):
        with suppress(BadInput):  # a version manager's shim for one that is not installed
            yield find_interpreter(command)


def _make_venv(folder: Path, precision: Precision, python: Interpreter, borrowed: Borrowed) -> None:
    folder.mkdir()
    with _told(precision, "no virtual environment could be made", f"Try {python.path} -m venv by hand"):
        run_installer([python.path, "-P", "-m", "venv", "--without-pip", str(folder / "venv")])
    # Not inside the virtual environment: what lies there, pip might remove, through the links.
    link_borrowed(borrowed, folder / "borrowed")
    (site_packages,) = folder.glob("venv/lib/python*/site-packages")
    (site_packages / "borrowed.pth").write_text(f"{folder / 'borrowed'}\n", encoding="utf-8")
    click.echo(f"borrowed from {sys.prefix}: {', '.join(sorted(borrowed)) or 'nothing'}", err=True)


def _keep_lock(
    folder: Path, precision: Precision, blueprint: Blueprint, borrowed: Borrowed, device: str
) -> Path:
    """The lock to install: from an earlier time if there is one, else the worker's own, else a new one."""
    lock = folder.with_name(f"{folder.name}.txt")
    if not lock.exists():
        if blueprint.lock is not None:
            pins = without_borrowed(blueprint.lock, borrowed)
        else:
            pins = _resolve(folder, precision, blueprint.requirements, borrowed, device)
        about = f"# {precision.name}, Python {blueprint.python}; borrowed: {' '.join(blueprint.borrowed)}\n"
        _write_whole(lock, (about + pins).encode())
    return lock


def _resolve(
    folder: Path, precision: Precision, requirements: list[str], borrowed: Borrowed, device: str
) -> str:
    """Let pip find the versions that fit together with what is borrowed."""
    needs = map(Requirement, requirements)
    index = _index((need for need in needs if canonicalize_name(need.name) not in borrowed), device)
    with TemporaryDirectory(prefix="qbench-") as scratch:
        report = Path(scratch, "report.json")
        fix = f"Check the dependencies in {precision.path}"
        with _told(precision, "its packages can't be resolved", fix):
            run_installer([*_pip(folder, index), "--dry-run", "--report", str(report), *requirements])
        return lock_of_report(report.read_bytes())


def _install(lock: Path, folder: Path, precision: Precision, device: str) -> None:
    """Install exactly what the lock names, and see whether that is what the header asks for."""
    pins = list(pinned(lock.read_text(encoding="utf-8")))
    own = lock_beside(precision)
    fix = f"Mend {own}" if own.exists() else f"Try again, or remove {lock} to resolve its packages anew"
    if pins:
        installer = _installer(folder, _index(pins, device))
        with _told(precision, "its lock can't be installed", fix):
            run_installer([*installer, "--no-deps", "--require-hashes", "-r", str(lock)])
    ask_anew()
    unmet = unmet_needs(precision, Interpreter(str(python_in(folder)), own=False).installed())
    if unmet:
        problem = f"its lock is not what its header asks for ({', '.join(unmet.values())})"
        raise BadInput("--make-env", precision.name, problem, fix)


def _installer(folder: Path, index: list[str]) -> list[str]:
    uv = shutil.which("uv")
    if uv is None:
        # What is borrowed is not ours to replace: the new package is found before it.
        return [*_pip(folder, index), "--ignore-installed"]
    # By itself uv takes the first index that knows a package; which one doesn't matter where hashes decide.
    anywhere = ["--index-strategy", "unsafe-best-match"]
    return [uv, "pip", "install", "--python", str(python_in(folder)), *index, *anywhere]


def _pip(folder: Path, index: list[str]) -> list[str]:
    # Where another index can't be reached pip goes on, but by itself after five retries for each package.
    patience = ["--retries", "1", "--timeout", "15"] if index else []
    pip = [sys.executable, "-P", "-m", "pip", "--python", str(python_in(folder))]
    return [*pip, "install", "--no-input", *index, *patience]


def _index(requirements: Iterable[Requirement], device: str) -> list[str]:
    """Where else to look: without a GPU, for the small torch."""
    names = {canonicalize_name(need.name) for need in requirements}
    return ["--extra-index-url", CPU_TORCH_INDEX] if device == "cpu" and "torch" in names else []


def _is_whole(precision: Precision, interpreter: Interpreter) -> bool:
    try:
        return not unmet_needs(precision, interpreter.installed())
    except BadInput:  # it does not even start
        return False


def _remove_others(kept: Path) -> None:
    """Remove what was made for the same precision earlier."""
    for path in kept.parent.iterdir():
        if path.is_dir() and path != kept:
            _remove(path)
        elif path.suffix == ".txt" and path.stem != kept.name:
            path.unlink()


def _remove(folder: Path) -> None:
    """Remove an environment, which stops being one before the first of its packages is gone."""
    (folder / BLUEPRINT).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _write_whole(path: Path, data: bytes) -> None:
    """Write a file that is either there as a whole or not at all."""
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_bytes(data)
    os.replace(unfinished, path)


@contextmanager
def _told(precision: Precision, problem: str, fix: str) -> Iterator[None]:
    """Turn the failure of an installer into one line."""
    try:
        yield
    except InstallerFailed as failure:
        raise BadInput("--make-env", precision.name, f"{problem} ({failure})", fix) from None
