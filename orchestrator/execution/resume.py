"""A run taken up again: what is left of it, and whether it may go on here.

The rows of a table are compared, so the second half of a run has to be measured as the first was: the same
jobs, on the same machine, by the same programs. Whatever differs is told and refused. What may differ without
moving a figure is left out of the comparison, and said below.
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
"""Options that don't decide what is measured."""
NOTICE = "model.notice"
"""Field of a job that is words: why the Hub was silent may be told otherwise each time."""
MOST_TOLD = 3
LONGEST_SHOWN = 100


def is_complete(run: Run) -> bool:
    """Whether every cell that was planned has a record."""
    left_out = run.plan.skipped.keys() - {cell.precision for cell in run.cells}
    return not left_out and _keys(run.cells) >= set(map(key_of, run.plan.jobs))


def left_of(plan: Plan, done: Collection[CellRecord]) -> Plan:
    """The plan less the cells that have a record, failures among them."""
    keys = _keys(done)
    return plan._replace(cells=[cell for cell in plan.cells if key_of(cell.job) not in keys])


def _keys(cells: Collection[CellRecord]) -> set[CellKey]:
    return {key_of(cell) for cell in cells if cell.job}


def take_up(recorded: Options, given: Options, typed: Collection[str]) -> Options:
    """The options of the run. Raises `BadInput` for a field that was `typed` and differs."""
    for field in typed:
        old, new = getattr(recorded, field), getattr(given, field)
        if field not in MAY_DIFFER and old != new:
            problem = f"the run was begun with {_shown(old)}"
            raise BadInput(flag(field), _shown(new), problem, "Leave it out, or begin a new run")
    return replace(recorded, **{field: getattr(given, field) for field in MAY_DIFFER.intersection(typed)})


def check_machine(path: Path, run: Run, machine: Environment) -> None:
    """Raise `BadInput` where this is not the machine, or not the program, that the run was begun with."""
    old, new = _facts(run.environment), _facts(machine)
    if ready := next((each for each in _readies(run) if each.device != "cpu"), None):
        # The same number may be another GPU, and the allocator's settings move every figure of memory.
        old["CUDA_VISIBLE_DEVICES"] = ready.cuda_visible_devices
        old["CUDA_DEVICE_ORDER"] = ready.cuda_device_order
        old["PYTORCH_ALLOC_CONF"] = ready.allocator_settings
        new |= {name: os.environ.get(name) for name in old.keys() - new.keys()}
        new["PYTORCH_ALLOC_CONF"] = new["PYTORCH_ALLOC_CONF"] or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    if run.plan.cwd and not Path(run.plan.cwd).is_dir():
        old["folder it was begun in"], new["folder it was begun in"] = run.plan.cwd, "gone"
    _refuse(path, list(_changes(old, new)))


def _facts(machine: Environment) -> dict[str, str | None]:
    """What figures hang on.

    Not the bytes of memory, which wander by what a kernel sets aside when it boots; nor a GPU's number, in
    which reboots differ, nor the words for why there is no GPU.
    """
    return {
        "qbench": machine.qbench,
        "commit": machine.commit,  # two states of a checkout that are both dirty can't be told apart
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
    """Raise `BadInput` where the options of the run mean other cells by now, or other packages."""
    changes = [*_availability(run.plan.skipped, plan), *_job_changes(run, plan), *_version_changes(run, plan)]
    _refuse(path, changes)


def _availability(skipped: dict[str, str], plan: Plan) -> Iterator[str]:
    for name, why in plan.left_out.items():
        if name not in skipped:
            yield f"{name} could be measured, and now: {why}"
    for name in skipped:
        if name not in plan.left_out:
            yield f"{name} was left out, and can be measured now"


def _job_changes(run: Run, plan: Plan) -> list[str]:
    """What differs between jobs, told of the first in which it does; those of `_availability` apart."""
    apart = run.plan.skipped.keys() | plan.left_out.keys()
    old, new = (
        {key_of(job): job for job in jobs if job.precision not in apart}
        for jobs in (run.plan.jobs, (cell.job for cell in plan.cells))
    )
    told: dict[str, str] = {}
    for key in old | new:
        if key not in new:
            told.setdefault("is not in the plan any more", key.name)
        elif key not in old:
            told.setdefault("was not in the plan", key.name)
        elif old[key] != new[key]:
            for line in _changes(to_builtins(old[key]), to_builtins(new[key])):
                told.setdefault(line, key.name)
    return [f"{name}: {line}" for line, name in told.items()]


def _version_changes(run: Run, plan: Plan) -> Iterator[str]:
    """Of the packages that workers imported, in the environments in which they would run now."""
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
    """A line for each value that differs, however deep it lies."""
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
        more = f"; and {len(changes) - MOST_TOLD} more" if len(changes) > MOST_TOLD else ""
        problem = "; ".join(changes[:MOST_TOLD]) + more
        raise BadInput("--resume", str(path), problem, "Resume it as it was begun, or begin a new run")
