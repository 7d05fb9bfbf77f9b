"""From options to jobs: which precisions, on which device, under which interpreter. No process is started."""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

from orchestrator.analysis.intervals import FEWEST_ROUNDS
from orchestrator.errors import BadInput
from orchestrator.planning.sweeps import check_sweeps, list_workloads
from orchestrator.precisions.availability import why_not
from orchestrator.precisions.catalog import Precision, choose
from orchestrator.precisions.environments import find_environment, make_command
from orchestrator.precisions.interpreter import Interpreter, find_interpreter, own_interpreter
from orchestrator.records.keys import BASELINE
from schemas.environment import Gpu
from schemas.job import CalibrationText, Job, ModelSource
from schemas.options import Options

OWN_PROMPTS = Path(__file__).parent / "prompts.txt"
CPU_BUDGET_S = 210.0
"""A CPU takes minutes for what a GPU does in seconds; a default run shall end within five."""


MOST_ROUNDS = 50
"""Rounds after which even `--precise` gives up."""


class Cell(NamedTuple):
    """One precision on one workload: a row to be. `why_not` tells what speaks against running it."""

    precision: Precision
    interpreter: Interpreter
    job: Job
    why_not: str | None


class Plan(NamedTuple):
    """Cells in the order they run; those of one precision follow each other and share a worker."""

    cells: list[Cell]
    budget_s: float | None
    cooldown_s: float
    timeout_s: float
    explicit: bool
    """Whether precisions were requested by name: one that can't run is then a failure, else left out."""
    precise: float | None = None
    """Half-width of the intervals at which later rounds are left out."""

    @property
    def runnable(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.why_not is None]

    @property
    def certain(self) -> list[Cell]:
        """Those that are run whatever comes: of `--precise`, which ends when it ends, the fewest."""
        return [cell for cell in self.runnable if not self.precise or cell.job.round < FEWEST_ROUNDS]

    @property
    def cells_to_budget(self) -> int:
        """Among how many cells the budget is shared out."""
        return len(self.certain)

    @property
    def left_out(self) -> dict[str, str]:
        """Precision → why it is not measured."""
        return {cell.precision.name: cell.why_not for cell in self.cells if cell.why_not is not None}


def make_plan(
    options: Options,
    precisions: Mapping[str, Precision],
    find_model: Callable[[], ModelSource],
    gpus: list[Gpu],
    cache_folder: Path,
) -> Plan:
    """Lay out a run. Raises `BadInput` for whatever in `options` doesn't fit together.

    The model is looked for last, since it may have to be fetched.
    """
    chosen = choose_precisions(options, precisions)
    choose(precisions, options.checkpoint, "--checkpoint")
    calibration = read_calibration(options, chosen)
    device = choose_device(options.device, gpus)
    check_sweeps(options, precisions, chosen)
    _check_comparison(options, chosen)
    interpreters = choose_interpreters(options.python, precisions, cache_folder)
    prompts = read_prompts(options.prompts)
    workloads = {
        precision.name: list_workloads(options, device, precision.name, prompts) for precision in chosen
    }
    packages = {precision.name: list(packages_of(precision)) for precision in chosen}
    obstacles = {
        precision.name: check(precision, device, gpus, interpreters[precision.name]) for precision in chosen
    }
    if options.all and None not in obstacles.values():
        first = chosen[0].name
        raise BadInput("--all", "", f"nothing can run here: {first} {obstacles[first]}", "See --list")
    model = find_model()
    rounds = MOST_ROUNDS if options.precise else options.rounds
    cells = [
        Cell(
            turn.precision,
            interpreters[turn.precision.name],
            Job(
                precision=turn.precision.name,
                model=model,
                workload=workload,
                device=device,
                packages=packages[turn.precision.name],
                checkpoint=options.checkpoint.get(turn.precision.name),
                calibration=calibration if _will_be_calibrated(turn.precision, options) else None,
                seed=options.seed,
                round=round_,
                aa_control=turn.aa_control,
                cache_folder=str(cache_folder),
            ),
            obstacles[turn.precision.name],
        )
        for round_ in range(rounds)
        for turn in _order(chosen, round_, options, rounds)
        for number, workload in enumerate(workloads[turn.precision.name])
        # What can't run at all is told once.
        if obstacles[turn.precision.name] is None or number == round_ == 0
    ]
    default_budget_s = CPU_BUDGET_S * options.rounds if device == "cpu" else None
    return Plan(
        cells,
        budget_s=options.budget or default_budget_s,
        cooldown_s=options.cooldown,
        timeout_s=options.timeout,
        explicit=not options.all,
        precise=options.precise,
    )


class Turn(NamedTuple):
    """A precision's place in a round."""

    precision: Precision
    aa_control: bool


def _order(chosen: list[Precision], round_: int, options: Options, rounds: int) -> list[Turn]:
    """Who runs after whom in a round: as they were named in the only one, else shuffled by seed and round.

    A drift over the run then falls on all alike.
    """
    turns = [Turn(precision, aa_control=False) for precision in chosen]
    if options.aa:
        turns += [Turn(precision, aa_control=True) for precision in chosen if precision.name == BASELINE]
    if rounds > 1:
        random.Random(f"{options.seed}/{round_}").shuffle(turns)
    return turns


def _check_comparison(options: Options, chosen: list[Precision]) -> None:
    """Raise `BadInput` where an option compares with a baseline that isn't measured."""
    if BASELINE in {precision.name for precision in chosen}:
        return
    for flag, given in (("--aa", options.aa), ("--precise", options.precise)):
        if given:
            raise BadInput(flag, "", f"compares with {BASELINE}, which is not measured", f"Add -p {BASELINE}")


def packages_of(precision: Precision) -> Iterator[str]:
    """Distributions that its header names for a machine like this one."""
    for need in map(Requirement, precision.requirements):
        if need.marker is None or need.marker.evaluate():
            yield need.name


def choose_precisions(options: Options, precisions: Mapping[str, Precision]) -> list[Precision]:
    """`--all`, or what `-p` names."""
    if options.all:
        return list(precisions.values())
    if not options.precision:
        raise BadInput(
            "--precision",
            "",
            "names nothing to measure",
            "Take --all, or -p with one of: " + ", ".join(precisions),
        )
    return choose(precisions, options.precision)


def choose_device(value: str, gpus: list[Gpu]) -> str:
    """`cpu` or `cuda:N`. Raises `BadInput` where there is no such device."""
    if value == "auto":
        return "cuda:0" if gpus else "cpu"
    if value == "cpu":
        return value
    kind, _, index = value.partition(":")
    if kind != "cuda" or not (index or "0").isdecimal():
        raise BadInput("--device", value, "is no device", "Take cpu, cuda, cuda:N or auto")
    if int(index or 0) >= len(gpus):
        has = f"only {len(gpus)} GPUs" if gpus else "no NVIDIA GPU"
        raise BadInput("--device", value, f"there is no such device: {has} here", "Take cpu or auto")
    return f"cuda:{int(index or 0)}"


def choose_interpreters(
    chosen: Mapping[str, str], precisions: Mapping[str, Precision], cache_folder: Path
) -> dict[str, Interpreter]:
    """Precision → the interpreter that `--python` names for it, or that of its own environment, or else the
    parent's own."""
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


def check(precision: Precision, device: str, gpus: list[Gpu], interpreter: Interpreter) -> str | None:
    """Why this precision can't run on this device under this interpreter, or None."""
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
    """One prompt a line, blank lines apart. Raises `BadInput` for a file that gives none."""
    path = OWN_PROMPTS if option is None else Path(option)
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            "--prompts", str(path), f"can't be read: {error}", "Name a text file with one prompt a line"
        ) from error
    if not prompts:
        raise BadInput("--prompts", str(path), "holds no prompt", "Write one prompt a line")
    return prompts


def read_calibration(options: Options, chosen: list[Precision]) -> CalibrationText | None:
    """The text that `--calibration` names. Raises `BadInput` where it can't be read or none is calibrated."""
    if options.calibration is None:
        return None
    if not any(_will_be_calibrated(each, options) for each in chosen):
        names = ", ".join(each.name for each in chosen)
        raise BadInput("--calibration", options.calibration, f"{names}: not calibrated here", "Leave it out")
    if (options.model or "").startswith("random:"):
        problem = "random weights are not calibrated"
        raise BadInput("--calibration", options.calibration, problem, "Leave it out, or name another --model")
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
