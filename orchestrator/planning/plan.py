"""From options to jobs: which precisions, on which device, under which interpreter. No worker is started."""

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
"""A CPU takes minutes for what a GPU does in seconds; a default run should end within five."""


MOST_ROUNDS = 50
"""The number of rounds after which even `--precise` stops."""


class Cell(NamedTuple):
    """One precision on one workload, a future row. `why_not` says why it can't run, or is None."""

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
    """Whether precisions were requested by name: one that can't run is then a failure, else left out."""
    precise: float | None = None
    """Half-width of the intervals at which the remaining rounds are skipped."""

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
        # A precision that can't run at all is listed once.
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
    """`--all`, or what `-p` names."""
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
        has = f"only {len(gpus)} GPU{'s' * (len(gpus) > 1)}" if gpus else "no NVIDIA GPU"
        raise BadInput("--device", value, f"no such device: {has} here", "Use cpu or auto")
    return f"cuda:{int(index or 0)}"


def choose_interpreters(
    chosen: Mapping[str, str], precisions: Mapping[str, Precision], cache_folder: Path
) -> dict[str, Interpreter]:
    """Precision → the interpreter from `--python`, or its separate environment's, or else the parent's."""
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
    """One prompt per line, skipping blank lines. Raises `BadInput` for a file without any."""
    path = OWN_PROMPTS if option is None else Path(option)
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
        raise BadInput("--calibration", options.calibration, problem, "Leave it out")
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
