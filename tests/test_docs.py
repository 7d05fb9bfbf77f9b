"""The documents are true: their commands parse and run, their outputs are what the commands print.

A fenced block that begins with `$ command`, and a table below `<!-- $ command -->`, show what that command
prints; `pytest --renew` rewrites them. All other `qbench-*` commands are parsed, and the cheap ones run. What
documents say in words is compared with the code where that can be done: defaults, columns, exit statuses.
"""

import ast
import difflib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from orchestrator import __version__
from orchestrator.analysis.comparison.compare import FIGURES, QUALITY, TOKENS
from orchestrator.cli import option_parser, program
from orchestrator.planning.models import CONFIGS_FOLDER
from orchestrator.planning.plan import CPU_BUDGET_S, read_prompts
from orchestrator.precisions.catalog import find_precisions
from orchestrator.records.store import RunFolder, read_run
from orchestrator.report.columns import BOUND, CPU_MEMORY, END_TO_END, GPU_MEMORY, SPEED
from orchestrator.units import mib, percent, rate, ratio
from schemas.options import Options

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
FOLDERS = ("docs", "results", "benchmarks")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(file for name in FOLDERS for file in (ROOT / name).glob("*.md"))])
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT: dict[str, Any] = PYPROJECT["project"]

FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
CONSOLE = re.compile(r"(?P<start>^```console\n\$ (?P<command>[^\n]+)\n)(?P<output>.*?)(?=^```$)", re.M | re.S)
COMMENT = re.compile(r"(?P<start>^<!-- \$ (?P<command>[^\n]+) -->\n\n)(?P<output>(?:\|[^\n]*\n)*)", re.M)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FOLDER = re.compile(r"([a-z-]+)/")
EMPHASIS = re.compile(r"\*([^*\n]+)\*")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
PATH = re.compile(
    r"(?:orchestrator|workers|schemas|tests|results|benchmarks|docs)/[\w./-]*|[A-Z]{3,}\.md|pyproject\.toml"
)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def text_of(name: str) -> str:
    return (ROOT / name).read_text()


def every_document(test: Any) -> Any:
    return pytest.mark.parametrize("document", DOCUMENTS, ids=relative)(test)


# Size and shape


def test_the_readme_is_short() -> None:
    assert len(README.read_text().split()) <= 1000


def test_every_document_is_in_the_index_and_the_readme() -> None:
    documents = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert documents <= set(LINK.findall(text_of("docs/README.md")))
    assert {f"docs/{name}" for name in documents} <= set(LINK.findall(README.read_text()))


@every_document
def test_a_blank_line_ends_every_table(document: Path) -> None:
    """Without it the next paragraph would be rendered as a row."""
    assert not re.search(r"^\|[^\n]*\n[^|\n]", without_blocks(document.read_text()), re.MULTILINE)


# Architecture


def test_the_architecture_begins_with_ten_tasks_and_where_to_go() -> None:
    tasks = list(table_rows(ARCHITECTURE.read_text(), "| you want to |"))
    assert len(tasks) == 10
    for task, (places, there) in tasks:
        paths = [ROOT / path for path in PATH.findall(places)]
        folders = [path if path.is_dir() else path.parent for path in paths]
        assert paths, task
        for name in re.findall(r"`(\w+\.py)`", there):
            assert any((folder / name).exists() for folder in folders), name


def test_rooms_are_listed_in_the_order_of_their_imports() -> None:
    contracts = PYPROJECT["tool"]["importlinter"]["contracts"]
    for package, heading in (("orchestrator", "room of the parent"), ("workers", "room of a worker")):
        (layers,) = (each["layers"] for each in contracts if each.get("containers") == [package])
        rooms = [layer for layer in layers if (ROOT / package / layer).is_dir()]
        listed = [room for room, _ in table_rows(ARCHITECTURE.read_text(), f"| {heading} |")]
        assert [room for room in listed if room != "workers/"] == [f"{package}/{room}/" for room in rooms]


# Links and paths


@every_document
def test_every_link_has_a_target(document: Path) -> None:
    for link in LINK.findall(without_blocks(document.read_text())):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def without_blocks(text: str) -> str:
    return FENCE.sub("", text)


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    headings = HEADING.findall(without_blocks(document.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_document
def test_every_path_exists(document: Path) -> None:
    text = without_blocks(document.read_text())
    named = {word for code in CODE.findall(text) for word in code.split() if PATH.fullmatch(word)}
    found = {path for path in named if "NAME" not in path and "TIME" not in path}
    assert not {path for path in found if not (ROOT / path).exists()}


# Commands


def commands_of(document: Path) -> Iterator[list[str]]:
    """The argv of each `qbench-*` command in a document's blocks and text, pipes and comments apart."""
    text = document.read_text()
    blocks = [block["body"] for block in FENCE.finditer(text) if block["language"] in ("", "console")]
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    lines += [comment["command"] for comment in COMMENT.finditer(text)]
    lines += CODE.findall(without_blocks(text))
    for line in lines:
        if re.match(r"qbench-[a-z]+ ", line):
            yield without_pipe(shlex.split(line, comments=True))


def without_pipe(words: list[str]) -> list[str]:
    return words[: words.index("|")] if "|" in words else words


COMMANDS = {
    " ".join(argv): argv for document in DOCUMENTS for argv in commands_of(document) if "…" not in argv[-1]
}


def parser_of(script: str) -> click.Command:
    """The click command behind a console script."""
    module = import_module(PROJECT["scripts"][script].partition(":")[0])
    return next(each for each in vars(module).values() if isinstance(each, click.Command))


@pytest.mark.parametrize("argv", COMMANDS.values(), ids=COMMANDS)
def test_every_command_parses(argv: list[str]) -> None:
    script, *arguments = argv
    given = parser_of(script).make_context(script, arguments, obj=AnyObject()).params
    option_parser.read_options(
        {name: value for name, value in given.items() if name in Options.__struct_fields__}
    )


class AnyObject:
    """Accepts any attributes that a command's callbacks set on it."""


def test_targets_of_make_and_modules_of_python_exist() -> None:
    shown = "\n".join(document.read_text() for document in DOCUMENTS)
    targets = set(re.findall(r"^([a-z][a-z-]*):", text_of("Makefile"), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", shown, re.MULTILINE)) <= targets
    modules = set(re.findall(r"python3? -m ((?:orchestrator|workers)[\w.]*)", shown))
    assert "workers.fp16" in modules
    assert all(find_spec(module) for module in modules)


def test_installation_commands_name_this_distribution_and_its_extras() -> None:
    shown = " ".join(document.read_text() for document in DOCUMENTS if document.name != "CHANGELOG.md")
    wanted = re.findall(r"(?:pip install|uvx) '?(\.|qbench[a-z-]*)(?:\[([^]]*)\])?", shown)
    assert {name for name, _ in wanted} == {".", PROJECT["name"]}
    extras = {extra for _, extras in wanted for extra in extras.split(",") if extra}
    assert extras - {"all", "nf4-dq"} <= set(find_precisions())


def test_every_command_is_documented() -> None:
    assert {argv[0] for argv in COMMANDS.values()} == set(PROJECT["scripts"])


def test_every_option_of_the_main_command_is_documented() -> None:
    words = set(re.findall(r"--[a-z-]+|-[a-z]\b", " ".join(each.read_text() for each in DOCUMENTS)))
    options = {option for each in parser_of("qbench-orchestrate").params for option in each.opts}
    assert {option for option in options if option.startswith("--")} <= words


def is_cheap(argv: list[str]) -> bool:
    """Whether it measures nothing and needs no run of the reader's."""
    if {"--list", "--dry-run"} & set(argv):
        return not {"--resume", "--plan"} & set(argv)
    reads_results = argv[0] != "qbench-orchestrate" and any(word.startswith("results") for word in argv)
    return reads_results and "--plot" not in argv


CHEAP = {name: argv for name, argv in COMMANDS.items() if is_cheap(argv)}


@pytest.mark.parametrize("argv", CHEAP.values(), ids=CHEAP)
def test_cheap_commands_run(argv: list[str], tmp_path: Path) -> None:
    done = run_in_shell(shlex.join(argv), tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_example_of_a_plan_file_is_valid(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", text_of("docs/sweeps.md"), re.DOTALL)
    (tmp_path / "sweep.toml").write_text(example)
    for command in ("", "-p fp32 --batch-size 8"):
        done = run_in_shell(f"qbench-orchestrate --plan {tmp_path}/sweep.toml --dry-run {command}", tmp_path)
        assert done.returncode == 0, done.stderr
        assert "fp32: random-qwen2.5-0.5b on cpu" in done.stdout


@pytest.mark.slow
def test_the_worker_in_the_foreground_runs(tmp_path: Path) -> None:
    (line,) = (name for name in COMMANDS if name.startswith("qbench-worker fp32"))
    config = '{"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512}'
    (tmp_path / "config.json").write_text(config)
    done = run_in_shell(f"{line} --device cpu --model random:{tmp_path}/config.json", tmp_path)  # smaller
    assert done.returncode == 0, done.stderr
    assert msgspec.json.decode(done.stdout.splitlines()[-1])["frame"] == "done"


def run_in_shell(command: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of the documents in the root of the checkout, with this environment's commands on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    inherited = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "COLUMNS")}
    environment = inherited | {"PATH": path, "QBENCH_CACHE": str(cache), "PYTHONUNBUFFERED": "1"}
    return subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


# Output


@every_document
def test_what_is_shown_is_what_is_printed(
    document: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    written = document.read_text()
    printed = written
    for pattern in (CONSOLE, COMMENT):
        printed = pattern.sub(lambda block: block["start"] + output_of(block["command"], tmp_path), printed)
    if request.config.getoption("--renew"):
        document.write_text(printed)
        return
    difference = difflib.unified_diff(
        written.splitlines(), printed.splitlines(), "document", "output", lineterm=""
    )
    assert written == printed, "\n".join(["`make golden` renews it:", *difference])


def output_of(command: str, cache: Path) -> str:
    """What a command prints, without the blanks at the ends of lines and of the whole."""
    lines = [line.rstrip() for line in run_in_shell(command, cache).stdout.splitlines()]
    return "\n".join(lines).strip("\n") + "\n"


# Figures and facts


def test_the_exit_statuses_are_those_of_the_command_line() -> None:
    usage = text_of("docs/usage.md")
    stated = [int(status) for status, _ in table_rows(usage, "| status | meaning |")]
    assert stated == [int(status) for status in re.findall(r"^    (\d+) ", program.__doc__ or "", re.M)]
    named = [program.BAD_INPUT, program.INTERNAL_ERROR, program.INTERRUPTED]
    assert stated == [0, 1, *named]


def test_the_default_protocol() -> None:
    usage = text_of("docs/usage.md")
    assert f"{len(read_prompts(None))} prompts of mixed kind" in usage
    assert f"{Options().new_tokens} new tokens each" in usage
    assert f"budget of {CPU_BUDGET_S:.0f} seconds" in usage
    assert {path.stem for path in CONFIGS_FOLDER.glob("*.json")} <= set(CODE.findall(usage))


def test_the_files_of_a_run(tmp_path: Path) -> None:
    usage = text_of("docs/usage.md")
    listed = {name for name, _ in table_rows(usage, "| file | content |")}
    run = read_run(ROOT / "results" / "h100-table-7b", samples=False)
    RunFolder.create(tmp_path, run.plan, run.environment)
    created = {f"{path.name}/" if path.is_dir() else path.name for path in tmp_path.iterdir()}
    assert listed == created | {"peaks.json", "records.jsonl"}


def test_the_folders_of_the_cache() -> None:
    text = text_of("docs/environments.md")
    listed = {name for names, _ in table_rows(text, "| folder | content |") for name in FOLDER.findall(names)}
    sources = "".join(
        path.read_text() for half in ("orchestrator", "workers") for path in (ROOT / half).rglob("*.py")
    )
    assert listed == set(re.findall(r'(?<!, )cache_folder(?:\(\))?\)? / "([\w-]+)"', sources))


def test_every_column_is_defined() -> None:
    metrics = text_of("docs/metrics.md")
    defined = [name for name, _ in table_rows(metrics, "| column | meaning |")]
    assert defined == [column.heading for column in (*SPEED, BOUND, END_TO_END, *GPU_MEMORY)]
    assert {column.heading for column in CPU_MEMORY} - set(defined) <= set(EMPHASIS.findall(metrics))


def test_every_figure_that_can_have_a_limit_is_explained() -> None:
    comparing = text_of("docs/comparing.md")
    figures = [name for names, _ in table_rows(comparing, "| figure |") for name in re.findall(r"\w+", names)]
    assert sorted(figures) == sorted([*FIGURES, QUALITY, TOKENS])


def test_the_upper_bound_of_torch_is_that_of_every_header() -> None:
    needs = [Requirement(need) for each in find_precisions().values() for need in each.requirements]
    bounds = {str(each) for need in needs if need.name == "torch" for each in need.specifier}
    uppers = {bound for bound in bounds if bound.startswith("<")}
    assert set(re.findall(r"`torch(<[\d.]+)`", text_of("docs/environments.md"))) == uppers


def test_the_example_of_a_precision_requires_what_its_relative_does(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", text_of("docs/precisions.md"), re.DOTALL)
    (tmp_path / "nf4_dq_bnb.py").write_text(example)
    precision = find_precisions(tmp_path)["nf4-dq"]
    assert precision.requirements == find_precisions()["nf4"].requirements


def test_the_table_of_the_readme_agrees_with_its_run(tmp_path: Path) -> None:
    (run,) = set(re.findall(r"records in `([^`]+)`", README.read_text().replace("\n", " ")))
    summary = msgspec.json.decode(run_in_shell(f"qbench-report {run} --format json", tmp_path).stdout)
    rows = dict(table_rows(README.read_text(), "| precision | batch 1 |"))
    assert len(rows) == 6
    for precision, cells in rows.items():
        bests = [each for each in summary["best"] if each["precision"] == precision]
        by_batch = {each["batch_size"]: each for each in bests}
        row = next(each for each in summary["rows"] if each["precision"] == precision)
        memory = [mib(row["loaded_bytes"]), percent(row["saved_versus_baseline"])]
        assert cells == [*(speed(by_batch[batch]) for batch in (1, 8, 32)), *memory]


def table_rows(text: str, heading: str) -> Iterator[tuple[str, list[str]]]:
    """The rows of the table with this heading: the first cell, and the others."""
    table = text[text.index(heading) :].partition("\n\n")[0]
    for line in table.splitlines()[2:]:
        first, *others = (cell.strip() for cell in line.strip("|").split("|"))
        yield first.strip("`"), others


def speed(best: dict[str, Any]) -> str:
    if best["precision"] == "fp16":
        return f"{rate(best['decode_tok_s'])} tok/s"
    return ratio(best["versus_baseline"])


@pytest.mark.parametrize("document", ["README.md", "docs/precisions.md"])
def test_every_precision_is_named(document: str) -> None:
    assert set(find_precisions()) <= set(CODE.findall(text_of(document)))


def test_bits_per_weight_are_those_of_the_headers() -> None:
    rows = table_rows(text_of("docs/precisions.md"), "| name | what it is |")
    stated = {}
    for names, (_, bits, _) in rows:
        numbers = [float(number) for number in re.findall(r"[\d.]+", bits.partition(" at ")[0])]
        named = CODE.findall(f"`{names}`")
        stated |= dict(zip(named, numbers if len(numbers) > 1 else numbers * len(named), strict=True))
    assert stated == {name: each.bits_per_weight for name, each in find_precisions().items()}


def test_supported_pythons_are_stated_once_and_agree() -> None:
    statements = [
        (relative(document), *span)
        for document in DOCUMENTS
        if document.name != "CHANGELOG.md"
        for span in re.findall(r"Python (3\.\d+) to (3\.\d+)", document.read_text())
    ]
    ((place, oldest, newest),) = statements
    assert place == "README.md"
    first, last = (int(version.partition(".")[2]) for version in (oldest, newest))
    supported = [f"3.{minor}" for minor in range(first, last + 1)]
    prefix = "Programming Language :: Python :: 3."
    classified = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if each.startswith(prefix)]
    assert classified == supported
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert [f"3.{minor}" for minor in range(last + 1) if f"3.{minor}.1" in allowed] == supported
    matrix = re.search(r"^ +python: (\[.*\])$", text_of(".github/workflows/ci.yml"), re.MULTILINE)
    assert matrix
    assert ast.literal_eval(matrix[1]) == supported


def test_the_changelog_has_this_version() -> None:
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d{2}-\d{2}$", text_of("CHANGELOG.md"), re.M)
    assert versions[0] == __version__


def test_python_in_the_documents_compiles() -> None:
    examples = [
        block["body"]
        for document in DOCUMENTS
        for block in FENCE.finditer(document.read_text())
        if block["language"] == "python"
    ]
    assert examples
    for example in examples:
        ast.parse(example)
