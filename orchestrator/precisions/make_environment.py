"""`--make-env` and `--drop-env`: make an environment for one precision, and remove it.

uv resolves the worker's header into a lock, unless the worker comes with one, and installs from the lock,
with every file checked against its hash, the first time too.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import msgspec
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from orchestrator.errors import BadInput
from orchestrator.precisions.availability import CPU_TORCH_INDEX, unmet_needs
from orchestrator.precisions.catalog import Precision
from orchestrator.precisions.environments import (
    Environment,
    Origin,
    find_environment,
    home_of,
    interpreter_in,
    origin_of,
    outdated_lock,
    worker_lock,
)
from orchestrator.precisions.interpreter import forget_answers, independent_variables, own_interpreter
from orchestrator.precisions.reuse import pth_lines, split_lock, write_wheels
from orchestrator.precisions.uv_program import uv_program


def make_environment(precision: Precision, cache_folder: Path, device: str) -> str:
    """Make an environment for `precision`, unless it has one that works. Returns a line with its location.

    The output of uv goes to stderr. Raises `BadInput` if uv fails; an earlier environment is then kept, and
    of the new one at most its lock.
    """
    home = home_of(precision.name, cache_folder)
    if not _works(find_environment(precision, cache_folder), precision):
        with _reserved(home, "--make-env"):
            click.echo(f"making an environment for {precision.name}: {home}", err=True)
            try:
                _fill(home / "unfinished", precision, device)
                _remove(home / "venv")
                (home / "unfinished").rename(home / "venv")
            finally:
                _remove(home / "unfinished")
    forget_answers()
    return f"{precision.name} has its own environment: {home}"


def drop_environment(name: str, cache_folder: Path) -> str:
    """Remove the environment of a precision, whose worker may be gone already. Returns a line to print.

    Its lock is kept. Raises `BadInput` if it has none.
    """
    homes = {folder.parent.name: folder.parent for folder in home_of("", cache_folder).glob("*/*/")}
    if name not in homes:
        fix = f"These have one: {', '.join(sorted(homes))}" if homes else "No precision has one"
        raise BadInput("--drop-env", name, "has no environment", fix)
    with _reserved(homes[name], "--drop-env"):
        for folder in homes[name].glob("*/"):
            _remove(folder)
    lock = homes[name] / "lock.txt"
    return f"removed the environment of {name}" + (f"; its lock is kept: {lock}" if lock.exists() else "")


@contextmanager
def _reserved(home: Path, option: str) -> Iterator[None]:
    """Keep other processes from making or removing this environment meanwhile."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        with (home / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
    except BlockingIOError:
        problem = "another process is making or removing its environment"
        raise BadInput(option, home.name, problem, "Wait for it to finish") from None
    except OSError as error:
        problem = f"{home} can't be used: {error.strerror or error}"
        raise BadInput(option, home.name, problem, "Set QBENCH_CACHE to another folder") from error


def _works(environment: Environment | None, precision: Precision) -> bool:
    if environment is None or environment.outdated is not None:
        return False
    try:
        return not unmet_needs(precision, environment.interpreter.installed())
    except BadInput:  # its Python doesn't start
        return False


def _fill(folder: Path, precision: Precision, device: str) -> None:
    """Make an environment in `folder`. Its copy of the lock is written last, and marks it as finished."""
    _remove(folder)
    own, allowed = own_interpreter(), SpecifierSet(precision.requires_python or "")
    reuse = allowed.contains(own.python_version(), prereleases=True)
    wanted = own.path if reuse else f"{allowed},>=3.11"
    options = ["--quiet", "--no-project", "--relocatable", "--python", wanted]
    _uv(precision, f"make an environment of Python {wanted}", "Install one", "venv", *options, folder)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "qbench_parent.pth").write_text(pth_lines() if reuse else "", encoding="utf-8")
    lock, python = folder.with_name("lock.txt"), interpreter_in(folder).python_version()
    if outdated_lock(precision, lock, python):
        origin = origin_of(precision, python)
        installed = own.installed() if reuse else {}
        if origin.lock is None:
            pins = _resolve(folder, precision, origin.requirements, installed, device)
        else:
            pins = origin.lock
        _write_lock(lock, origin, pins, installed)
    _install(lock, folder, precision, device)
    shutil.copyfile(lock, folder / "lock.txt")


def _write_lock(lock: Path, origin: Origin, pins: str, installed: dict[str, str]) -> None:
    """Write a lock without those of the parent's `installed` packages that are reused."""
    missing, origin.reused = split_lock(pins, installed)
    click.echo(f"reused from {sys.prefix}: {', '.join(origin.reused) or 'nothing'}", err=True)
    unfinished = lock.with_suffix(".part")
    unfinished.write_text(f"# {msgspec.json.encode(origin).decode()}\n{missing}", encoding="utf-8")
    os.replace(unfinished, lock)


def _resolve(
    folder: Path, precision: Precision, requirements: list[str], installed: dict[str, str], device: str
) -> str:
    """Let uv find versions that fit together, preferably those that are `installed`."""
    needs_torch = any(Requirement(need).name == "torch" for need in unmet_needs(precision, installed))
    options = ["--generate-hashes", "--no-header", "--no-annotate", *_torch_index(needs_torch, device)]
    with TemporaryDirectory(prefix="qbench-") as scratch:
        wheels, found, builds = (Path(scratch, name) for name in ("wheels", "found.txt", "builds.txt"))
        offered = write_wheels(installed, wheels)
        # uv regards this as its earlier result, and keeps the versions in it.
        found.write_text("".join(f"{name}=={version}\n" for name, version in offered.items()), "utf-8")
        # Without modules they can't build anything.
        builds.write_text("".join(f"{name}!={version}\n" for name, version in offered.items()), "utf-8")
        problem, fix = f"resolve {', '.join(requirements)}", f"Check the dependencies in {precision.path}"
        command = ["pip", "compile", "--python", folder, *options, "--build-constraints", builds]
        command += ["--output-file", found, "-"]
        _uv(precision, problem, fix, *command, find_links=wheels, stdin="\n".join(requirements))
        return found.read_text(encoding="utf-8")


def _install(lock: Path, folder: Path, precision: Precision, device: str) -> None:
    """Install exactly the packages in the lock, and check that they meet the header."""
    own = worker_lock(precision)
    fix = f"Fix {own}" if own.exists() else f"Try again, or remove {lock} to resolve its packages again"
    options = ["--require-hashes", "--allow-empty-requirements"]
    options += _torch_index("\ntorch==" in lock.read_text(encoding="utf-8"), device)
    _uv(precision, f"install {lock}", fix, "pip", "sync", "--python", folder, *options, lock)
    forget_answers()
    unmet = unmet_needs(precision, interpreter_in(folder).installed())
    if unmet:
        problem = f"its lock does not meet its header ({', '.join(unmet.values())})"
        raise BadInput("--make-env", precision.name, problem, fix)


def _torch_index(needs_torch: bool, device: str) -> list[str]:
    """Without a GPU, the index of the small torch, unless the user has set another."""
    if device != "cpu" or not needs_torch or "UV_INDEX" in os.environ:
        return []
    return ["--index", CPU_TORCH_INDEX, "--index-strategy", "unsafe-best-match"]


def _uv(
    precision: Precision, task: str, fix: str, *arguments: object, find_links: object = "", stdin: str = ""
) -> None:
    """Let uv do a task. Raises `BadInput` if it fails; its own message is on stderr."""
    variables = independent_variables()
    # As an option, the folder would replace the user's setting.
    links = filter(None, [str(find_links), variables.get("UV_FIND_LINKS")])
    variables["UV_FIND_LINKS"] = ",".join(links)
    command = [uv_program(), *map(str, arguments)]
    if subprocess.run(command, env=variables, input=stdin, text=True, stdout=subprocess.DEVNULL).returncode:
        raise BadInput("--make-env", precision.name, f"uv can't {task}; its reason is above", fix)


def _remove(folder: Path) -> None:
    """Remove an environment: its lock first, so that it stops being one before it is incomplete."""
    (folder / "lock.txt").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
