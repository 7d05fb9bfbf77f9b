"""Built distributions contain every package and data file, and an extra for every worker's header."""

import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from orchestrator import __version__
from orchestrator.precisions.catalog import find_precisions

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel that `pip install .` would install."""
    folder = tmp_path_factory.mktemp("dist")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, check=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


@pytest.fixture(scope="module")
def sdist_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files of the source distribution, relative to its root."""
    folder = tmp_path_factory.mktemp("sdist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(folder)],
        check=True,
        cwd=ROOT,
    )
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(wheel.read(name))


def requirements(metadata: Message, extra: str | None) -> set[str]:
    """Names of the packages that our metadata requires for `pip install qbench-orchestrate[extra]`."""
    needs = map(Requirement, metadata.get_all("Requires-Dist", []))
    return {
        canonicalize_name(need.name)
        for need in needs
        if (need.marker.evaluate({"extra": extra or ""}) if need.marker else extra is None)
    }


def test_the_version_is_that_of_the_package(metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("qbench-orchestrate", __version__)


def test_required_packages_are_light(metadata: Message) -> None:
    base = requirements(metadata, extra=None)
    assert "msgspec" in base
    assert not base & {"torch", "transformers", "accelerate", "bitsandbytes", "torchao", "autoawq"}


def test_every_precision_has_its_extra(metadata: Message) -> None:
    for name, precision in find_precisions().items():
        expected = {canonicalize_name(Requirement(need).name) for need in precision.requirements}
        assert requirements(metadata, extra=canonicalize_name(name)) == expected
        assert not precision.in_all or expected <= requirements(metadata, extra="all")


def test_the_extra_all_omits_workers_that_opt_out(metadata: Message) -> None:
    left_out = {name for name, precision in find_precisions().items() if not precision.in_all}
    assert {"hqq", "awq-marlin", "gptq"} <= left_out
    assert not {"gemlite", "hqq", "gptqmodel"} & requirements(metadata, extra="all")


def test_the_extra_dev_has_the_tools_that_make_runs(metadata: Message) -> None:
    programs = set(re.findall(r"\$\(BIN\)/([a-z-]+)", (ROOT / "Makefile").read_text()))
    assert {"ruff", "mypy", "pytest", "lint-imports"} <= programs
    brought_by = {"lint-imports": "import-linter"}
    own = {"python", *(program for program in programs if program.startswith("qbench-"))}
    assert {brought_by.get(each, each) for each in programs - own} <= requirements(metadata, extra="dev")


def test_the_wheel_contains_every_file_of_its_packages(wheel: zipfile.ZipFile) -> None:
    """In particular texts, configs and recipes, which workers read from their own folders."""
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in ("orchestrator", "workers", "schemas")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected <= set(wheel.namelist())


def is_measured_data(name: str) -> bool:
    return name.startswith(("results/", "benchmarks/", ".ci/", "tests/golden/h100-"))


def test_the_wheel_contains_no_measured_data(wheel: zipfile.ZipFile) -> None:
    packages = {name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" not in name}
    assert packages == {"orchestrator", "workers", "schemas"}


def test_the_sdist_contains_sources_and_no_measured_data(sdist_names: set[str]) -> None:
    assert {"pyproject.toml", "hatch_build.py", "LICENSE", "orchestrator/records/store.py"} <= sdist_names
    assert "tests/test_packaging.py" in sdist_names
    assert not [name for name in sdist_names if is_measured_data(name)]


def test_commands_are_installed(wheel: zipfile.ZipFile) -> None:
    name = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    text = wheel.read(name).decode()
    for command in ("qbench-orchestrate", "qbench-worker", "qbench-memory", "qbench-report"):
        assert f"{command} = orchestrator." in text
