"""Whether a precision can run here, and if not, one line with the reason and a fix.

Pure: device, compute capability and packages are arguments, so every answer can be tested on any machine.
Nothing is imported to find out; problems that only show when a worker runs become `Failed` cells.
"""

import platform
import shlex
from collections.abc import Iterator, Mapping

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from orchestrator.precisions.catalog import Precision

SCHEMAS_NEED = "msgspec"
"""Required by every worker in addition to its header's packages, to exchange messages with the parent."""

CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
"""Has torch builds of a quarter of the usual size, for machines without a GPU."""


def why_not(
    precision: Precision,
    device: str,
    compute_capability: tuple[int, int] | None,
    installed: Mapping[str, str],
    *,
    python_version: str = platform.python_version(),
    pip: str | None = "pip install",
    make_env: str | None = None,
) -> str | None:
    """Why `precision` can't run on `device` with these packages; None if it can.

    `device` is `cpu`, `cuda` or `cuda:N`; `compute_capability` is None on a CPU, or if it is unknown.
    `installed` maps canonical distribution names to versions; it, `python_version` and `pip` describe the
    interpreter that the worker would run under. `pip` is the command that installs into that interpreter and
    `make_env` the one that makes an environment; None omits it from the advice.
    """
    return (
        _wrong_device(precision, device)
        or _too_old_gpu(precision, compute_capability)
        or _too_old_python(precision, python_version, make_env)
        or _missing_packages(precision, device, installed, pip, make_env)
    )


def _wrong_device(precision: Precision, device: str) -> str | None:
    kind = device.partition(":")[0]
    if kind in precision.devices:
        return None
    return f"runs on {' and '.join(precision.devices)}, not on {kind}"


def _too_old_gpu(precision: Precision, compute_capability: tuple[int, int] | None) -> str | None:
    needed = precision.min_compute_capability
    if needed is None or compute_capability is None:
        return None
    if compute_capability >= divmod(round(needed * 10), 10):
        return None
    major, minor = compute_capability
    return f"needs a GPU of compute capability {needed}; this one has {major}.{minor}"


def _too_old_python(precision: Precision, python_version: str, make_env: str | None) -> str | None:
    needed = precision.requires_python
    if needed is None or SpecifierSet(needed).contains(python_version, prereleases=True):
        return None
    return f"needs Python {needed}; this one is {python_version}" + (f": {make_env}" if make_env else "")


def _missing_packages(
    precision: Precision, device: str, installed: Mapping[str, str], pip: str | None, make_env: str | None
) -> str | None:
    unmet = unmet_needs(precision, installed)
    if not unmet:
        return None
    wants_torch = any(Requirement(need).name == "torch" for need in unmet)
    index = f" --extra-index-url {CPU_TORCH_INDEX}" if wants_torch and device == "cpu" else ""
    install = f"{pip} {shlex.join(unmet)}{index}" if pip else None
    commands = ", or ".join(filter(None, (install, make_env)))
    return f"needs other packages ({', '.join(unmet.values())}): {commands}"


def unmet_needs(precision: Precision, installed: Mapping[str, str]) -> dict[str, str]:
    """Each unmet requirement as a PEP 508 string → what is installed instead."""
    return dict(_unmet([*precision.requirements, SCHEMAS_NEED], installed))


def _unmet(requirements: list[str], installed: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for need in map(Requirement, requirements):
        if need.marker and not need.marker.evaluate():
            continue
        version = installed.get(canonicalize_name(need.name))
        if version is None:
            yield str(need), f"{need.name} is not installed"
        elif not need.specifier.contains(version, prereleases=True):
            yield str(need), f"{need.name} is {version}"
