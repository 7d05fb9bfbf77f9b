"""Resuming a run: the cells that are left, and whether they may be measured here.

The rows of a table are compared with each other, so the second half of a run must be measured as the first
was: the same jobs, on the same machine, with the same software. Any difference is an error. What can't affect
a figure is not compared; the comments below give the reasons.
"""

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from reprlib import repr as shortened

from msgspec import to_builtins
from msgspec.structs import replace
from packaging.utils import canonicalize_name

from orchestrator.errors import BadInput, flag
from orchestrator.planning.plan import Plan
from orchestrator.records.keys import CellKey, key_of
from schemas.environment import Environment
from schemas.frames import Ready
from schemas.options import Options
from schemas.record import CellRecord, Run

MAY_DIFFER = {"timeout"}
"""Options that don't affect what is measured."""
NOTICE = "model.notice"
"""A field of a job that is only text: why the Hub was unreachable may be worded differently each time."""
MOST_SHOWN = 3
LONGEST_SHOWN = 100


def is_complete(run: Run) -> bool:
    """Whether every cell that was planned has a record."""
    unrecorded = run.plan.skipped.keys() - {cell.precision for cell in run.cells}
    return not unrecorded and _keys(run.cells) >= set(map(key_of, run.plan.jobs))


def left_of(plan: Plan, done: Collection[CellRecord]) -> Plan:
    """The plan without the cells that have a record, even one of a failure."""
    keys = _keys(done)
    return plan._replace(cells=[cell for cell in plan.cells if key_of(cell.job) not in keys])


def _keys(cells: Collection[CellRecord]) -> set[CellKey]:
    return {key_of(cell) for cell in cells if cell.job}


def resumed_options(recorded: Options, given: Options, typed: Collection[str]) -> Options:
    """The options of the run. Raises `BadInput` for a `typed` field that differs from the recorded one."""
    for field in typed:
        old, new = getattr(recorded, field), getattr(given, field)
        if field not in MAY_DIFFER and old != new:
            problem = f"the run was started with {_shown(old)}"
            raise BadInput(flag(field), _shown(new), problem, "Omit it, or start a new run")
    return replace(recorded, **{field: getattr(given, field) for field in MAY_DIFFER.intersection(typed)})


def check_machine(path: Path, run: Run, machine: Environment) -> None:
    """Raise `BadInput` if the run was started on another machine, or with other software."""
    old, new = _facts(run.environment), _facts(machine)
    if ready := next((each for each in _readies(run) if each.device != "cpu"), None):
        # The same index may be another GPU, and the allocator's settings affect every memory figure.
        old["CUDA_VISIBLE_DEVICES"] = ready.cuda_visible_devices
        old["CUDA_DEVICE_ORDER"] = ready.cuda_device_order
        old["PYTORCH_ALLOC_CONF"] = ready.allocator_settings
        new |= {name: os.environ.get(name) for name in old.keys() - new.keys()}
        new["PYTORCH_ALLOC_CONF"] = new["PYTORCH_ALLOC_CONF"] or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    if run.plan.cwd and not Path(run.plan.cwd).is_dir():
        old["working directory"], new["working directory"] = run.plan.cwd, "missing"
    _refuse(path, list(_changes(old, new)))


def _facts(machine: Environment) -> dict[str, str | None]:
    """The facts about a machine that figures depend on.

    Not included: the size of memory, which varies by what a kernel reserves at boot; a GPU's index, which may
    change at a reboot; and the reason why there is no GPU.
    """
    return {
        "qbench": machine.qbench,
        "commit": machine.commit,  # two dirty states of a checkout look the same
        "Python": machine.python,
        "platform": machine.platform,
        "CPU": f"{machine.cpu_count} × {machine.cpu}",
        "driver": machine.driver,
        "GPUs": ", ".join(sorted(f"{gpu.name} {gpu.uuid}{' (MIG)' * gpu.mig}" for gpu in machine.gpus)),
    }


def _readies(run: Run) -> Iterator[Ready]:
    yield from (cell.ready for cell in run.cells if cell.ready)
    if run.peaks and run.peaks.ready:
        yield run.peaks.ready


def check_plan(path: Path, run: Run, plan: Plan) -> None:
    """Raise `BadInput` if the options of the run now give other cells, or other packages."""
    changes = [*_availability(run.plan.skipped, plan), *_job_changes(run, plan), *_version_changes(run, plan)]
    _refuse(path, changes)


def _availability(skipped: dict[str, str], plan: Plan) -> Iterator[str]:
    for name, why in plan.skipped.items():
        if name not in skipped:
            yield f"{name} could be measured before, but not now: {why}"
    for name in skipped:
        if name not in plan.skipped:
            yield f"{name} was skipped, but can be measured now"


def _job_changes(run: Run, plan: Plan) -> list[str]:
    """What differs between jobs, with the first job in which it does; `_availability` covers the rest."""
    skipped = run.plan.skipped.keys() | plan.skipped.keys()
    old, new = (
        {key_of(job): job for job in jobs if job.precision not in skipped}
        for jobs in (run.plan.jobs, (cell.job for cell in plan.cells))
    )
    found: dict[str, str] = {}
    for key in old | new:
        if key not in new:
            found.setdefault("is no longer in the plan", key.name)
        elif key not in old:
            found.setdefault("was not in the plan", key.name)
        elif old[key] != new[key]:
            for line in _changes(to_builtins(old[key]), to_builtins(new[key])):
                found.setdefault(line, key.name)
    return [f"{name}: {line}" for line, name in found.items()]


def _version_changes(run: Run, plan: Plan) -> Iterator[str]:
    """Changes in the packages that workers imported, compared with the environments they would run in now."""
    interpreters = {cell.precision.name: cell.interpreter for cell in plan.runnable}
    readies = {cell.precision: cell.ready for cell in run.cells if cell.ready}
    for name, ready in readies.items():
        if interpreter := interpreters.get(name):
            installed = interpreter.installed()
            versions = {package: installed.get(canonicalize_name(package)) for package in ready.versions}
            old = {"Python": ready.python, **ready.versions}
            new = {"Python": interpreter.python_version(), **versions}
            yield from (f"{name}: {line}" for line in _changes(old, new))


def _changes(old: Mapping[str, object], new: Mapping[str, object], above: str = "") -> Iterator[str]:
    """A line for each value that differs, at any depth."""
    for name in dict.fromkeys([*old, *new]):
        path, was, now = f"{above}{name}", old.get(name), new.get(name)
        match was, now:
            case dict(), dict():
                yield from _changes(was, now, f"{path}.")
            case list(), list():
                yield from _changes(_numbered(was), _numbered(now), f"{path}.")
            case _ if was != now and path != NOTICE:
                yield f"{path} was {_shown(was)}, is now {_shown(now)}"


def _numbered(values: list[object]) -> dict[str, object]:
    return {str(number): value for number, value in enumerate(values)}


def _shown(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return "none" if value is None or not text else text if len(text) < LONGEST_SHOWN else shortened(text)


def _refuse(path: Path, changes: list[str]) -> None:
    if changes:
        more = f"; and {len(changes) - MOST_SHOWN} more" if len(changes) > MOST_SHOWN else ""
        problem = "; ".join(changes[:MOST_SHOWN]) + more
        raise BadInput("--resume", str(path), problem, "Undo the change, or start a new run")
