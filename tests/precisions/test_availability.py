"""Why a precision can't run here: one line each, with the command that helps where one does."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.precisions.availability import why_not
from orchestrator.precisions.catalog import Precision

INSTALLED = {"torch": "2.13.0+cpu", "bitsandbytes": "0.50.2", "msgspec": "0.22.0"}


def precision(**changes: Any) -> Precision:
    facts: dict[str, Any] = {
        "name": "int8",
        "module": "workers.int8_bnb",
        "path": Path("workers/int8_bnb.py"),
        "label": "INT8",
        "bits_per_weight": 8,
        "devices": ["cpu", "cuda"],
        "requirements": ["torch>=2.6", "bitsandbytes>=0.49"],
        "summary": "LLM.int8.",
    }
    return Precision(**(facts | changes))


def test_nothing_speaks_against_it() -> None:
    assert why_not(precision(), "cpu", None, INSTALLED) is None


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_every_spelling_of_a_gpu_counts_as_one(device: str) -> None:
    assert why_not(precision(devices=["cuda"]), device, (9, 0), INSTALLED) is None


def test_a_device_that_it_has_no_kernels_for() -> None:
    assert why_not(precision(devices=["cuda"]), "cpu", None, INSTALLED) == "runs on cuda, not on cpu"


@pytest.mark.parametrize(
    ("needed", "has", "enough"),
    [
        (8.9, (8, 6), False),
        (8.9, (8, 9), True),
        (8.9, (12, 0), True),
        (10.0, (9, 0), False),
        (7.5, None, True),
    ],
)
def test_compute_capability_is_compared_by_parts(
    needed: float, has: tuple[int, int] | None, enough: bool
) -> None:
    answer = why_not(precision(min_compute_capability=needed), "cuda", has, INSTALLED)
    assert (answer is None) is enough


def test_a_gpu_that_is_too_old_is_named_with_both_figures() -> None:
    answer = why_not(precision(min_compute_capability=8.9), "cuda:0", (7, 5), INSTALLED)
    assert answer == "needs a GPU of compute capability 8.9; this one has 7.5"


def test_a_missing_package_comes_with_the_command_that_brings_it() -> None:
    installed = {"torch": "2.13.0", "msgspec": "0.22.0"}
    answer = why_not(precision(), "cpu", None, installed, pip="env/bin/python -m pip")
    assert answer == (
        "needs other packages (bitsandbytes is not installed): "
        "env/bin/python -m pip install 'bitsandbytes>=0.49'"
    )


def test_a_package_of_another_version_counts_as_missing() -> None:
    answer = why_not(precision(), "cuda", (9, 0), INSTALLED | {"torch": "2.5.1"})
    assert answer == "needs other packages (torch is 2.5.1): pip install 'torch>=2.6'"


def test_an_environment_of_its_own_is_advised_beside_pip_or_alone() -> None:
    installed = {"torch": "2.13.0", "msgspec": "0.22.0"}
    make = "qbench-worker --make-env int8"
    both = why_not(precision(), "cpu", None, installed, make_env=make)
    assert both is not None
    assert both.endswith(f"(bitsandbytes is not installed): pip install 'bitsandbytes>=0.49', or {make}")
    alone = why_not(precision(), "cpu", None, installed, pip=None, make_env=make)
    assert alone == f"needs other packages (bitsandbytes is not installed): {make}"
    old = why_not(precision(requires_python=">=3.99"), "cpu", None, INSTALLED, make_env=make)
    assert old is not None
    assert old.endswith(f": {make}")


def test_torch_for_a_cpu_comes_from_its_small_index() -> None:
    installed = {name: version for name, version in INSTALLED.items() if name != "torch"}
    on_cpu = why_not(precision(), "cpu", None, installed)
    on_gpu = why_not(precision(), "cuda", (9, 0), installed)
    assert on_cpu is not None
    assert on_cpu.endswith("'torch>=2.6' --extra-index-url https://download.pytorch.org/whl/cpu")
    assert on_gpu is not None
    assert "index-url" not in on_gpu


def test_every_worker_needs_what_schemas_needs() -> None:
    answer = why_not(precision(requirements=[]), "cpu", None, {})
    assert answer == "needs other packages (msgspec is not installed): pip install msgspec"


def test_names_are_compared_as_pip_compares_them_and_markers_are_heeded() -> None:
    requirements = ["Nvidia_ML.py>=12", "pywin32; sys_platform == 'win32'"]
    installed = {"nvidia-ml-py": "13.6", "msgspec": "0.22.0"}
    assert why_not(precision(requirements=requirements), "cpu", None, installed) is None


def test_a_python_that_is_too_old() -> None:
    answer = why_not(precision(requires_python=">=3.13"), "cpu", None, INSTALLED, python_version="3.12.4")
    assert answer == "needs Python >=3.13; this one is 3.12.4"
