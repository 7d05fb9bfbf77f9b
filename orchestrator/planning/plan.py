"""From options to jobs: which precisions, on which device, under which interpreter. No worker is started."""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement

from orchestrator.analysis.verdicts import FEWEST_ROUNDS
from orchestrator.errors import BadInput
from orchestrator.planning.sweeps import check_sweeps, list_workloads
from orchestrator.precisions.availability import why_not
from orchestrator.precisions.catalog import Precision, choose
from orchestrator.precisions.environments import find_environment, make_command
from orchestrator.precisions.interpreter import Interpreter, find_interpreter, own_interpreter
from orchestrator.records.keys import BASELINE
from orchestrator.units import counted
from schemas.environment import Gpu
from schemas.job import CalibrationText, Job, ModelSource, Workload
from schemas.options import Options

BUILT_IN_PROMPTS = Path(__file__).parent / "prompts.txt"
CPU_BUDGET_S = 210.0
"""A CPU takes minutes for what a GPU does in seconds; a default run should end within five."""

MOST_ROUNDS = 50
"""The number of rounds after which even `--precise` stops."""


class Cell(NamedTuple):
    """One precision on one workload. `why_not` is the reason why it can't run, or None."""

    precision: Precision
    interpreter: Interpreter
    job: Job
    why_not: str | None


class Plan(NamedTuple):
    """Cells in the order they run; those of one precision are adjacent and share a worker."""

    cells: list[Cell]
    budget_s: float | None
    cooldown_s: float
    timeout_s: float
    explicit: bool
    """Whether precisions were requested by name: one that can't run then fails; otherwise it is skipped."""
    precise: float | None = None
    """Half-width of the intervals, relative to the ratio, at which no further round is run."""

    @property
    def runnable(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.why_not is None]

    @property
    def certain(self) -> list[Cell]:
        """The cells that run in any case: with `--precise`, those of the minimum number of rounds."""
        return [cell for cell in self.runnable if not self.precise or cell.job.round < FEWEST_ROUNDS]

    @property
    def cells_to_budget(self) -> int:
        """The number of cells that share the budget."""
        return len(self.certain)

    @property
    def skipped(self) -> dict[str, str]:
        """Precision → why it is not measured."""
        return {cell.precision.name: cell.why_not for cell in self.cells if cell.why_not is not None}


def make_plan(
    options: Options,
    precisions: Mapping[str, Precision],
    find_model: Callable[[], ModelSource],
    gpus: list[Gpu],
    cache_folder: Path,
) -> Plan:
    """Plan a run. Raises `BadInput` for options that contradict each other or this machine.

    The model is looked up last, because it may have to be downloaded.
    """
    chosen = choose_precisions(options, precisions)
    choose(precisions, options.checkpoint, "--checkpoint")
    calibration = read_calibration(options, chosen)
    device = choose_device(options.device, gpus)
    check_sweeps(options, precisions, chosen)
    _check_comparison(options, chosen)
    interpreters = choose_interpreters(options.python, precisions, cache_folder)
    prompts = read_prompts(options.prompts)
    obstacles = {each.name: find_obstacle(each, device, gpus, interpreters[each.name]) for each in chosen}
    _require_one(obstacles, options)
    make_job = partial(
        Job, model=find_model(), device=device, seed=options.seed, cache_folder=str(cache_folder)
    )
    candidates = {
        each.name: _Candidate(
            each,
            interpreters[each.name],
            obstacles[each.name],
            list_workloads(options, device, each.name, prompts),
            partial(make_job, **_facts(each, options, calibration)),
        )
        for each in chosen
    }
    return _make_plan(list(_cells(candidates, options)), device, options)


def _make_plan(cells: list[Cell], device: str, options: Options) -> Plan:
    default_budget_s = CPU_BUDGET_S * options.rounds if device == "cpu" else None
    return Plan(
        cells,
        budget_s=options.budget or default_budget_s,
        cooldown_s=options.cooldown,
        timeout_s=options.timeout,
        explicit=not options.all,
        precise=options.precise,
    )


class _Candidate(NamedTuple):
    """A chosen precision, and what its cells have in common."""

    precision: Precision
    interpreter: Interpreter
    why_not: str | None
    workloads: list[Workload]
    make_job: Callable[..., Job]
    """A Job of this precision, given a workload and its place in the run."""

    def cells(self, round_: int, aa_control: bool) -> Iterator[Cell]:
        """Its cells in a round. A precision that can't run at all is listed once."""
        for number, workload in enumerate(self.workloads):
            if self.why_not is None or number == round_ == 0:
                job = self.make_job(workload=workload, round=round_, aa_control=aa_control)
                yield Cell(self.precision, self.interpreter, job, self.why_not)


def _facts(precision: Precision, options: Options, calibration: CalibrationText | None) -> dict[str, Any]:
    """The fields of a Job that depend only on the precision."""
    return {
        "precision": precision.name,
        "packages": list(packages_of(precision)),
        "checkpoint": options.checkpoint.get(precision.name),
        "calibration": calibration if _will_be_calibrated(precision, options) else None,
    }


def _cells(candidates: dict[str, _Candidate], options: Options) -> Iterator[Cell]:
    """The cells of all rounds, in the order they run."""
    chosen = [each.precision for each in candidates.values()]
    rounds = MOST_ROUNDS if options.precise else options.rounds
    for round_ in range(rounds):
        for turn in _order(chosen, round_, options, rounds):
            yield from candidates[turn.precision.name].cells(round_, turn.aa_control)


def _require_one(obstacles: dict[str, str | None], options: Options) -> None:
    """Raise `BadInput` if `--all` finds no precision that can run."""
    if options.all and None not in obstacles.values():
        name, obstacle = next(iter(obstacles.items()))
        raise BadInput("--all", "", f"nothing can run here: {name} {obstacle}", "See --list")


class Turn(NamedTuple):
    """One precision's turn in a round."""

    precision: Precision
    aa_control: bool


def _order(chosen: list[Precision], round_: int, options: Options, rounds: int) -> list[Turn]:
    """The order in a round: as given if there is only one, else shuffled by seed and round.

    Drift during the run then affects all precisions alike.
    """
    turns = [Turn(precision, aa_control=False) for precision in chosen]
    if options.aa:
        turns += [Turn(precision, aa_control=True) for precision in chosen if precision.name == BASELINE]
    if rounds > 1:
        random.Random(f"{options.seed}/{round_}").shuffle(turns)
    return turns


def _check_comparison(options: Options, chosen: list[Precision]) -> None:
    """Raise `BadInput` if an option compares with a baseline that isn't measured."""
    if BASELINE in {precision.name for precision in chosen}:
        return
    for flag, given in (("--aa", options.aa), ("--precise", options.precise)):
        if given:
            raise BadInput(flag, "", f"compares with {BASELINE}, which is not measured", f"Add -p {BASELINE}")


def packages_of(precision: Precision) -> Iterator[str]:
    """The distributions that its header requires on this platform."""
    for need in map(Requirement, precision.requirements):
        if need.marker is None or need.marker.evaluate():
            yield need.name


def choose_precisions(options: Options, precisions: Mapping[str, Precision]) -> list[Precision]:
    """All precisions with `--all`, otherwise those that `-p` names. Raises `BadInput`."""
    if options.all:
        return list(precisions.values())
    if not options.precision:
        raise BadInput(
            "--precision",
            "",
            "is missing",
            "Use --all, or -p with one of: " + ", ".join(precisions),
        )
    return choose(precisions, options.precision)


def choose_device(value: str, gpus: list[Gpu]) -> str:
    """`cpu` or `cuda:N`. Raises `BadInput` if there is no such device."""
    if value == "auto":
        return "cuda:0" if gpus else "cpu"
    if value == "cpu":
        return value
    kind, _, index = value.partition(":")
    if kind != "cuda" or not (index or "0").isdecimal():
        raise BadInput("--device", value, "is not a device", "Use cpu, cuda, cuda:N or auto")
    if int(index or 0) >= len(gpus):
        has = f"only {counted(len(gpus), 'GPU')}" if gpus else "no NVIDIA GPU"
        raise BadInput("--device", value, f"no such device: {has} here", "Use cpu or auto")
    return f"cuda:{int(index or 0)}"


def choose_interpreters(
    chosen: Mapping[str, str], precisions: Mapping[str, Precision], cache_folder: Path
) -> dict[str, Interpreter]:
    """Precision → the interpreter from `--python`, or that of its separate environment, or the parent's."""
    choose(precisions, chosen, "--python")
    return {
        name: find_interpreter(chosen[name]) if name in chosen else _interpreter_of(precision, cache_folder)
        for name, precision in precisions.items()
    }


def _interpreter_of(precision: Precision, cache_folder: Path) -> Interpreter:
    environment = find_environment(precision, cache_folder)
    if environment is None or environment.outdated is not None:
        return own_interpreter()
    return environment.interpreter


def find_obstacle(precision: Precision, device: str, gpus: list[Gpu], interpreter: Interpreter) -> str | None:
    """Why this precision can't run on this device under this interpreter; None if it can."""
    index = int(device.partition(":")[2] or 0)
    capability = gpus[index].compute_capability if device != "cpu" and index < len(gpus) else None
    return why_not(
        precision,
        device,
        capability,
        interpreter.installed(),
        python_version=interpreter.python_version(),
        pip=None if interpreter.made else interpreter.pip_command(),
        make_env=make_command(precision) if interpreter.own or interpreter.made else None,
    )


def read_prompts(option: str | None) -> list[str]:
    """One prompt per line, skipping blank lines. Raises `BadInput` for a file without any."""
    path = BUILT_IN_PROMPTS if option is None else Path(option)
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            "--prompts", str(path), f"can't be read: {error}", "Name a text file with one prompt per line"
        ) from error
    if not prompts:
        raise BadInput("--prompts", str(path), "contains no prompts", "Write one prompt per line")
    return prompts


def read_calibration(options: Options, chosen: list[Precision]) -> CalibrationText | None:
    """The text named by `--calibration`. Raises `BadInput` if it can't be read or nothing is calibrated."""
    if options.calibration is None:
        return None
    if not any(_will_be_calibrated(each, options) for each in chosen):
        names = ", ".join(each.name for each in chosen)
        problem = f"no calibration in this run of {names}"
        raise BadInput("--calibration", options.calibration, problem, "Omit it")
    if (options.model or "").startswith("random:"):
        problem = "random weights are not calibrated"
        raise BadInput("--calibration", options.calibration, problem, "Omit it, or name another --model")
    path = Path(options.calibration).expanduser().absolute()
    try:
        content = path.read_bytes()
        content.decode()
    except (OSError, UnicodeDecodeError) as error:
        problem = f"can't be read: {error}"
        raise BadInput("--calibration", options.calibration, problem, "Name a file of UTF-8 text") from error
    return CalibrationText(path=str(path), sha256=hashlib.sha256(content).hexdigest())


def _will_be_calibrated(precision: Precision, options: Options) -> bool:
    return precision.calibrated and precision.name not in options.checkpoint
