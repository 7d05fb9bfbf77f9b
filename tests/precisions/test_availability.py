"""Reasons why a precision can't run here: one line each, with a command that helps if there is one."""

from pathlib import Path
from typing import Any

import pytest
from golden_text import Golden

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


def test_a_precision_that_can_run() -> None:
    assert why_not(precision(), "cpu", None, INSTALLED) is None


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_every_spelling_of_a_gpu_counts_as_one(device: str) -> None:
    assert why_not(precision(devices=["cuda"]), device, (9, 0), INSTALLED) is None


def test_a_device_without_kernels(golden: Golden) -> None:
    golden(str(why_not(precision(devices=["cuda"]), "cpu", None, INSTALLED)))


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


def test_a_gpu_that_is_too_old_is_reported_with_both_figures(golden: Golden) -> None:
    golden(str(why_not(precision(min_compute_capability=8.9), "cuda:0", (7, 5), INSTALLED)))


def test_a_missing_package_comes_with_the_command_that_installs_it(golden: Golden) -> None:
    installed = {"torch": "2.13.0", "msgspec": "0.22.0"}
    answer = str(why_not(precision(), "cpu", None, installed, pip="env/bin/python -m pip install"))
    assert answer.endswith(": env/bin/python -m pip install 'bitsandbytes>=0.49'")
    golden(answer)


def test_a_package_of_another_version_counts_as_missing(golden: Golden) -> None:
    golden(str(why_not(precision(), "cuda", (9, 0), INSTALLED | {"torch": "2.5.1"})))


def test_an_environment_is_advised_next_to_pip_or_alone(golden: Golden) -> None:
    installed = {"torch": "2.13.0", "msgspec": "0.22.0"}
    make = "qbench-worker --make-env int8"
    golden(str(why_not(precision(), "cpu", None, installed, make_env=make)))
    golden(str(why_not(precision(), "cpu", None, installed, pip=None, make_env=make)))
    old = precision(requires_python=">=3.99")
    golden(str(why_not(old, "cpu", None, INSTALLED, python_version="3.12.4", make_env=make)))


def test_torch_for_a_cpu_comes_from_its_small_index() -> None:
    installed = {name: version for name, version in INSTALLED.items() if name != "torch"}
    on_cpu = str(why_not(precision(), "cpu", None, installed))
    on_gpu = str(why_not(precision(), "cuda", (9, 0), installed))
    assert on_cpu.endswith("'torch>=2.6' --extra-index-url https://download.pytorch.org/whl/cpu")
    assert on_gpu.endswith("'torch>=2.6'")


def test_every_worker_needs_what_schemas_needs() -> None:
    answer = str(why_not(precision(requirements=[]), "cpu", None, {}))
    assert answer.endswith("pip install msgspec")


def test_names_are_normalized_and_markers_evaluated() -> None:
    requirements = ["Nvidia_ML.py>=12", "pywin32; sys_platform == 'win32'"]
    installed = {"nvidia-ml-py": "13.6", "msgspec": "0.22.0"}
    assert why_not(precision(requirements=requirements), "cpu", None, installed) is None


def test_a_python_that_is_too_old(golden: Golden) -> None:
    golden(str(why_not(precision(requires_python=">=3.13"), "cpu", None, INSTALLED, python_version="3.12.4")))
