"""Plan files: the options of a run as TOML; each key is an option without its leading dashes.

    precision = ["fp16", "int8"]
    batch-size = "1-32*2"

    [checkpoint]
    awq = "Qwen/Qwen2.5-7B-Instruct-AWQ"

    [[workloads]]             # every combination of its values; the options above apply to the rest
    prompt-tokens = 8192

Values are read as on the command line, whose options override the file; paths, too, are relative to the
current directory. Errors cite the line.
"""

import difflib
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from orchestrator.cli.option_parser import FORMS, expectation, read_form, typed_options
from orchestrator.errors import BadInput
from schemas.options import Options, Sweep

T = TypeVar("T", Options, Sweep)

Place = tuple[str | int, ...]
"""The path of a value in a document, e.g. `("workloads", 0, "batch-size")`."""


@contextmanager
def with_plan_file(path: str | None, given: Options) -> Iterator[Options]:
    """The command line's options, on top of those of the plan file, if there is one.

    A `BadInput` raised in the `with` block about an option of the file cites its line.
    """
    if path is None:
        yield given
        return
    file, typed = PlanFile(path), typed_options()
    try:
        yield overlay(file.options(), given, typed)
    except BadInput as error:
        raise file.located(error, typed) from None


def overlay(planned: Options, given: Options, typed: Collection[str]) -> Options:
    """The planned options, overridden by those typed on the command line, in every sweep too.

    If precisions were typed, each sweep keeps those of its precisions that are among them.
    """
    chosen = {name: getattr(given, name) for name in typed}
    if "precision" in typed:
        chosen["all"] = given.all
    overridden = {name: None for name in typed if name in Sweep.__struct_fields__ and name != "precision"}
    sweeps = [msgspec.structs.replace(sweep, **overridden) for sweep in planned.workloads]
    if "precision" in typed:
        sweeps = [_narrowed(sweep, given.precision) for sweep in sweeps]
    return msgspec.structs.replace(planned, workloads=sweeps, **chosen)


def _narrowed(sweep: Sweep, precisions: list[str]) -> Sweep:
    """The same workloads for only those of its precisions that are among these; there may be none."""
    if sweep.precision is None:
        return sweep
    return msgspec.structs.replace(sweep, precision=[name for name in sweep.precision if name in precisions])


class PlanFile:
    """A plan file that was read. Raises `BadInput` if it can't be read or is not TOML."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.text = Path(path).read_text(encoding="utf-8")
            self.document: dict[str, Any] = msgspec.toml.decode(self.text)
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput("--plan", path, f"can't be read: {error}", "Name a TOML file of options") from None
        except msgspec.DecodeError as error:
            problem, _, at = str(error).partition(" (at ")
            number = re.search(r"line (\d+)", at)
            line = number[1] if number else len(self.text.splitlines())
            raise BadInput(f"--plan {path}, line {line}", "", "is not TOML", problem) from None

    def options(self) -> Options:
        """Raises `BadInput` for the first unknown key or invalid value."""
        return self._read_table(self.document, Options, ())

    def located(self, error: BadInput, typed: Collection[str]) -> BadInput:
        """The same error, with the line if it is about a value in this file.

        Errors about a sweep name it with dots: `--workloads.0.precision`.
        """
        keys = error.option.removeprefix("--").split(".")
        place = tuple(int(key) if key.isdecimal() else key for key in keys)
        if not _holds(self.document, place) or keys[0].replace("-", "_") in typed:
            return error
        return self._error(place, error.value, error.problem, error.fix)

    def _read_table(self, table: dict[str, Any], kind: type[T], place: Place) -> T:
        names = {name.replace("_", "-"): name for name in kind.__struct_fields__}
        values = {}
        for key, value in table.items():
            if key not in names:
                near = difflib.get_close_matches(key.lower(), names, n=1)
                guess = f"Did you mean {near[0]}? " if near else ""
                fix = f"{guess}Known keys: {', '.join(names)}"
                raise self._error((*place, key), "", "unknown key", fix)
            values[names[key]] = self._read_value(names[key], value, kind, (*place, key))
        return kind(**values)

    def _read_value(self, name: str, value: Any, kind: type[T], place: Place) -> Any:
        if name == "workloads" and isinstance(value, list) and all(isinstance(each, dict) for each in value):
            return [self._read_table(each, Sweep, (*place, index)) for index, each in enumerate(value)]
        try:
            return getattr(msgspec.convert({name: _split(name, value)}, kind), name)
        except BadInput as error:
            raise self._error(place, error.value, error.problem, error.fix) from None
        except msgspec.ValidationError as error:
            shown = msgspec.json.encode(value).decode()
            raise self._error(place, shown, "is not valid", expectation(error)) from None

    def _error(self, place: Place, value: str, problem: str, fix: str) -> BadInput:
        return BadInput(
            f"--plan {self.path}, line {line_of(place, self.text)}: {place[-1]}", value, problem, fix
        )


def _split(name: str, value: Any) -> Any:
    """Split a text that holds several values into a list."""
    form = FORMS.get(name)
    if form is not None and isinstance(value, str):
        return read_form(name, value, form)
    return [value] if form == "range" and isinstance(value, int) else value


def line_of(place: Place, text: str) -> int:
    """The line on which the statement that sets `place` begins.

    TOML readers do not report lines. But the first N lines of a file are valid TOML themselves, unless they
    end within a statement, so this reads ever more of them until `place` is there.
    """
    lines = text.split("\n")
    begin = 1
    for count in range(1, len(lines) + 1):
        try:
            document = msgspec.toml.decode("\n".join(lines[:count]))
        except msgspec.DecodeError:
            continue
        if _holds(document, place):
            break
        begin = count + 1
    return begin


def _holds(document: Any, place: Place) -> bool:
    try:
        for step in place:
            document = document[step]
    except (KeyError, IndexError):
        return False
    return True
