"""The rules of the architecture, checked in fresh interpreters or on the source itself.

The parent imports no torch; `schemas` needs msgspec alone; a new precision is one new file; only the command
line exits. The order of rooms is a contract in pyproject.toml, which `make lint` checks.
"""

import ast
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from worker_runs import ROOT, copy_packages

from orchestrator.precisions.catalog import find_precisions
from schemas.frames import Done
from schemas.record import CellRecord

HEAVY = ("torch", "transformers", "accelerate", "bitsandbytes", "torchao", "awq", "numpy", "workers")
BURNT = 77
PACKAGES = ("orchestrator", "workers", "schemas")
NAMED_TUPLE = {"_replace", "_fields", "_asdict", "_make"}


def python(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter, without the working directory on its path."""
    command = [sys.executable, "-P", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload]


def modules_of(package: Path, name: str) -> list[str]:
    found = pkgutil.walk_packages([str(package)], f"{name}.")
    return [module.name for module in found if not module.name.endswith("__main__")]


@pytest.fixture
def mines(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH in which importing a heavy package ends the process immediately."""
    for name in HEAVY[:-1]:
        (tmp_path / "mines" / name).mkdir(parents=True)
        (tmp_path / "mines" / name / "__init__.py").write_text(f"import os\nos._exit({BURNT})\n")
    return tmp_path / "mines"


# The parent is light


def test_no_module_of_the_parent_imports_anything_heavy() -> None:
    names = modules_of(ROOT / "orchestrator", "orchestrator")
    assert {"orchestrator.execution.run", "orchestrator.report.summary", "orchestrator.cli.worker"} <= set(
        names
    )
    code = f"import sys, importlib\nfor name in {names}: importlib.import_module(name)\n"
    done = python("-c", code + f"print([name for name in {HEAVY} if name in sys.modules])")
    assert done.stdout == "[]\n", done.stderr


def test_mines_end_the_process(mines: Path) -> None:
    done = python("-c", "import torch", env=os.environ | {"PYTHONPATH": str(mines)})
    assert done.returncode == BURNT


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("orchestrate", ["--list"], "LLM.int8"),
        ("orchestrate", ["--help"], "--new-tokens"),
        ("orchestrate", ["--all", "--dry-run", "-m", "random:qwen2.5-0.5b"], "fp16: "),
        ("worker", ["--list"], "LLM.int8"),
        ("memory", ["--help"], "RUN"),
        ("report", ["--help"], "RUN"),
        (
            "compare",
            ["--history", str(ROOT / "tests/golden"), "-m", "smollm2"],
            "smollm2-135m-instruct on NVIDIA H100",
        ),
    ],
)
def test_commands_answer_without_torch(
    script: str, arguments: list[str], said: str, mines: Path, tmp_path: Path
) -> None:
    command = [Path(sys.executable).with_name(f"qbench-{script}"), *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(mines)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_schemas_need_msgspec_alone(tmp_path: Path) -> None:
    for package in (ROOT / "schemas", Path(msgspec.__file__).parent):
        (tmp_path / package.name).symlink_to(package)
    names = ["schemas", *modules_of(ROOT / "schemas", "schemas")]
    assert "schemas.job" in names
    code = f"""
import sys, importlib
sys.path.append({str(tmp_path)!r})
for name in {names}: importlib.import_module(name)
ours = {{name.partition(".")[0] for name in sys.modules}} - sys.stdlib_module_names - {{"__main__"}}
print(sorted(ours))
from schemas.job import decode_job
"""
    done = python("-I", "-S", "-c", code)
    assert done.stdout.startswith("['msgspec', 'schemas']\n"), done.stdout + done.stderr


def test_workers_import_nothing_heavy_before_stdout_is_redirected() -> None:
    modules = [precision.module for precision in find_precisions().values()]
    code = f"import sys, importlib\nfor name in {modules}: importlib.import_module(name)\n"
    done = python("-c", code + f"print([name for name in {HEAVY[:-1]} if name in sys.modules])")
    assert done.stdout == "[]\n", done.stderr


# A new precision is one new file


def test_workers_are_short_and_alike() -> None:
    for precision in find_precisions().values():
        tree = ast.parse(precision.path.read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert "load" in functions, precision.name
        assert len(precision.path.read_text().splitlines()) <= 45, precision.name


def test_only_its_worker_names_a_precision() -> None:
    """The parent has no list of precisions that a new one would have to be added to."""
    for path in source_files(ROOT / "orchestrator"):
        constants = {node.value for node in ast.walk(ast.parse(path.read_text())) if is_text(node)}
        named = constants & set(find_precisions())
        # The baseline of all ratios, and a package that has the same name as a precision.
        assert named <= {"fp16", "hqq"}, (path.name, named)


@pytest.mark.slow
def test_a_new_file_is_a_new_precision(tiny_llama: Path, tmp_path: Path) -> None:
    house = copy_packages(tmp_path / "house", PACKAGES)
    new = (house / "workers/fp32.py").read_text()
    for old, other in (('32"', '33"'), ("bits_per_weight = 32", "bits_per_weight = 33")):
        new = new.replace(old, other)
    (house / "workers/another.py").write_text(new)
    (tmp_path / "prompts.txt").write_text("Why is the sky blue?\nName a river.\n")
    outside = os.environ | {"PYTHONPATH": str(house), "QBENCH_CACHE": str(tmp_path / "cache")}
    options = ["-p", "fp33", "-p", "fp32", "-m", tiny_llama, "--new-tokens", 10, "--device", "cpu"]
    options += ["--prompts", "prompts.txt", "--out", "run"]
    done = python("-m", "orchestrator", *options, cwd=tmp_path, env=outside)
    assert done.returncode == 0, done.stderr
    assert "fp33" in done.stdout
    lines = (tmp_path / "run/records.jsonl").read_bytes()
    first, second = msgspec.json.Decoder(CellRecord).decode_lines(lines)
    assert (first.precision, first.label, first.bits_per_weight) == ("fp33", "FP33", 33)
    assert isinstance(first.outcome, Done)
    assert [trial.token_ids for trial in first.trials] == [trial.token_ids for trial in second.trials]
    listed = python("-m", "orchestrator", "--list", cwd=tmp_path, env=outside).stdout
    assert "fp33" in listed


@pytest.mark.slow
def test_the_example_in_the_documents_is_a_precision(tiny_llama: Path, tmp_path: Path) -> None:
    house = copy_packages(tmp_path / "house", PACKAGES)
    example = (ROOT / "docs/precisions.md").read_text().partition("```python\n")[2].partition("```")[0]
    (house / "workers/nf4_dq_bnb.py").write_text(example)
    outside = os.environ | {"PYTHONPATH": str(house), "QBENCH_CACHE": str(tmp_path / "cache")}
    options = ["-p", "nf4-dq", "-m", tiny_llama, "--new-tokens", 2, "--device", "cpu", "--out", "run"]
    done = python("-m", "orchestrator", *options, cwd=tmp_path, env=outside)
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = msgspec.json.Decoder(CellRecord).decode_lines((tmp_path / "run/records.jsonl").read_bytes())
    assert record.loaded is not None
    assert "Linear4bit" in record.loaded.linear_classes


# Who may do what


def source_files(package: Path) -> Iterator[Path]:
    yield from sorted(package.rglob("*.py"))


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


ENDINGS = {("sys", "exit"), ("os", "_exit"), ("os", "abort")}


def exits(path: Path) -> bool:
    """Whether a module can end the process: sys.exit, os._exit, exit(), quit(), or raise SystemExit."""
    return any(map(is_ending, ast.walk(ast.parse(path.read_text()))))


def is_ending(node: ast.AST) -> bool:
    match node:
        case ast.Attribute(value=ast.Name(id=module), attr=name):
            return (module, name) in ENDINGS
        case ast.ImportFrom(module=module, names=aliases):
            return any((module, alias.name) in ENDINGS for alias in aliases)
        case ast.Name(id=name):
            return name in {"exit", "quit", "SystemExit"}
    return False


def imports(path: Path, package: str) -> bool:
    """Whether a module imports `package` or anything in it, even inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=aliases):
                names = [alias.name for alias in aliases]
            case ast.ImportFrom(module=str(module), level=0):
                names = [module]
            case _:
                continue
        if package in (name.partition(".")[0] for name in names):
            return True
    return False


def everywhere() -> dict[str, Path]:
    return {
        str(path.relative_to(ROOT)): path for package in PACKAGES for path in source_files(ROOT / package)
    }


def test_only_the_command_line_exits() -> None:
    # bundle is a separate program, for `make bundle`; a worker's exit status is part of its protocol.
    may = {"orchestrator/cli/program.py", "orchestrator/precisions/bundle.py", "workers/harness/main.py"}
    assert {name for name, path in everywhere().items() if exits(path)} == may


def test_only_one_module_uses_nvml() -> None:
    assert {name for name, path in everywhere().items() if imports(path, "pynvml")} == {
        "orchestrator/hardware/nvml.py"
    }


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def private_names(path: Path) -> set[str]:
    """Names with a leading underscore that a test uses from the product's modules."""
    tree = ast.parse(path.read_text())
    modules, private = set(), set()
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in PACKAGES:
                names = {alias.asname or alias.name for alias in node.names}
                private |= set(filter(is_private, names))
                modules |= names
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if owner in modules:
                if is_private(name) and name not in NAMED_TUPLE:
                    private.add(f"{owner}.{name}")
    return private


def test_tests_use_nothing_private() -> None:
    found = {path.name: names for path in source_files(ROOT / "tests") if (names := private_names(path))}
    assert found == {}
