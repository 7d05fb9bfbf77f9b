"""The precisions, read from the headers of the files in `workers/` and in a folder of the user's.

A worker declares its packages, label and devices in a PEP 723 block, with a `[tool.qbench]` table inside.
The block is a comment, so listing the precisions parses text and imports nothing: neither torch nor
the worker itself, whose packages may not even be installed here. A new precision is one new file: in
`workers/`, or, with no edit to the project, in the folder that `--workers` names.
"""

import ast
import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from orchestrator.errors import BadInput, QbenchError

WORKERS_FOLDER = Path(__file__).resolve().parents[2] / "workers"
"""Our own, found relative to this package; a lookup by name could find a `workers/` of the user's."""

USERS_PACKAGE = "user_workers"
"""The package name of the folder that `--workers` names, so its files and ours can have the same names."""

# The reference regular expression of PEP 723.
_BLOCK = re.compile(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$")


class BadHeader(QbenchError):
    """A worker's header is invalid; the text names the file and the problem."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")


class Precision(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One way to load the model, as declared in the header of its worker."""

    # A name becomes part of file names, and precedes the = in `--python NAME=PATH`.
    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z")] = msgspec.field(name="precision")
    module: str
    """The argument of `python -m`, e.g. `workers.int8_bnb`."""
    path: Path
    label: str
    bits_per_weight: float
    """Stored bits per quantized weight, scales and zero points included."""
    devices: list[Literal["cpu", "cuda"]]
    min_compute_capability: float | None = None
    """As NVIDIA writes it, 7.5 for a T4; None if any GPU will do."""
    calibrated: bool = False
    """Whether the worker's `prepare` calibrates its weights with a text."""
    in_all: bool = True
    """Whether the extra `all` includes its packages: not if they conflict with the others', or are large and
    useless on a machine without a GPU."""
    requirements: list[str]
    """PEP 508 strings."""
    requires_python: str | None = None
    summary: str
    """First line of the worker's docstring."""

    @property
    def package(self) -> str:
        """The package of its module, which is the folder of `path`."""
        return self.module.partition(".")[0]


class _Tools(msgspec.Struct):
    qbench: dict[str, Any] | None = None


class _Header(msgspec.Struct):
    """The part of a PEP 723 block that is used here."""

    dependencies: list[str] = []
    requires_python: str | None = msgspec.field(name="requires-python", default=None)
    tool: _Tools = msgspec.field(default_factory=_Tools)


def find_all_precisions(users_folder: str | None) -> dict[str, Precision]:
    """Our precisions and those in the folder that `--workers` names, by name: most bits first, then by name.

    Raises `BadHeader`, and `BadInput` for an unusable folder or a name that is one of ours.
    """
    ours = find_precisions()
    if users_folder is None:
        return ours
    theirs = _users_precisions(users_folder)
    for name in ours.keys() & theirs.keys():
        problem = f"the precision {name} is one of qbench's own"
        raise BadInput("--workers", str(theirs[name].path), problem, "Give it another name in its header")
    return _ranked(ours | theirs)


def _users_precisions(users_folder: str) -> dict[str, Precision]:
    folder = Path(users_folder).expanduser().absolute()
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "there is no such folder"
        raise BadInput("--workers", users_folder, problem, "Name the folder that holds your worker files")
    found = find_precisions(folder, USERS_PACKAGE)
    if not found:
        fix = "Write its header as docs/precisions.md shows"
        raise BadInput("--workers", users_folder, "no .py file in it has a [tool.qbench] table", fix)
    return found


def find_precisions(folder: Path = WORKERS_FOLDER, package: str = "workers") -> dict[str, Precision]:
    """Read every worker in `folder`: name → precision, most bits first, then by name.

    Files without a `[tool.qbench]` table are not workers and are ignored. Raises `BadHeader`.
    """
    found: dict[str, Precision] = {}
    for path in sorted(folder.glob("*.py")):
        precision = read_precision(path, package)
        if precision is None:
            continue
        if other := found.get(precision.name):
            problem = f"the precision {precision.name} is taken by {other.path.name}"
            raise BadHeader(precision.path, problem)
        found[precision.name] = precision
    return _ranked(found)


def _ranked(precisions: Mapping[str, Precision]) -> dict[str, Precision]:
    ranked = sorted(precisions.values(), key=lambda each: (-each.bits_per_weight, each.name))
    return {precision.name: precision for precision in ranked}


def read_precision(path: Path, package: str = "workers") -> Precision | None:
    """Read one worker's header; None if it has no `[tool.qbench]` table. Raises `BadHeader`.

    `package` is the package name of the file's folder.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadHeader(path, f"can't be read: {error}") from None
    header = _read_header(path, text)
    if header.tool.qbench is None:
        return None
    if "." in path.stem:
        raise BadHeader(path, "has a dot in its name, so Python can't import it")
    facts = {
        **header.tool.qbench,
        "module": f"{package}.{path.stem}",
        "path": path,
        "requirements": header.dependencies,
        "requires_python": header.requires_python,
        "summary": _summary(path, text),
    }
    try:
        return msgspec.convert(facts, Precision)
    except msgspec.ValidationError as error:
        raise BadHeader(path, f"[tool.qbench]: {error}") from None


def _read_header(path: Path, text: str) -> _Header:
    block = _script_block(path, text)
    try:
        header = msgspec.convert(block, _Header)
        for need in header.dependencies:
            Requirement(need)
        SpecifierSet(header.requires_python or "")
    except (msgspec.ValidationError, InvalidRequirement, InvalidSpecifier) as error:
        problem = str(error).partition("\n")[0]
        raise BadHeader(path, f"its `# /// script` block: {problem}") from None
    return header


def choose(
    precisions: Mapping[str, Precision], names: Iterable[str], option: str = "--precision"
) -> list[Precision]:
    """Look up the named precisions, in the order given, each once. Raises `BadInput` for an unknown one."""
    return [precisions[_known(precisions, name, option)] for name in dict.fromkeys(names)]


def _known(precisions: Mapping[str, Precision], name: str, option: str) -> str:
    if name in precisions:
        return name
    near = difflib.get_close_matches(name.lower(), precisions, n=1)
    guess = f"Did you mean {near[0]}? " if near else ""
    raise BadInput(option, name, "there is no such precision", f"{guess}There are {', '.join(precisions)}")


def _script_block(path: Path, text: str) -> dict[str, Any]:
    blocks = [block for block in _BLOCK.finditer(text) if block["type"] == "script"]
    if len(blocks) > 1:
        raise BadHeader(path, "has more than one `# /// script` block")
    if not blocks:
        # PEP 723 ignores a block that is not closed, but one with our table was meant to be read.
        if re.search(r"(?m)^# ?\[tool\.qbench\]", text):
            raise BadHeader(path, "its `# /// script` block is not closed, or a line in it lacks its `# `")
        return {}
    lines = blocks[0]["content"].splitlines()
    try:
        return tomllib.loads("\n".join(line[2:] for line in lines))
    except tomllib.TOMLDecodeError as error:
        raise BadHeader(path, f"its `# /// script` block is not TOML: {error}") from None


def _summary(path: Path, text: str) -> str:
    try:
        docstring = ast.get_docstring(ast.parse(text))
    except SyntaxError as error:
        raise BadHeader(path, f"is not Python: {error.msg}, line {error.lineno}") from None
    if not docstring:
        raise BadHeader(path, "has no docstring to explain what the format stores and when it wins")
    return docstring.splitlines()[0]
