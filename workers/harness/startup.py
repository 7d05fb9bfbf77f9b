"""A worker's start: importing its packages, and the Ready frame that says what it runs on."""

import importlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from schemas.frames import Ready
from workers.generation.device import Device

MEASURED_WITH = ("torch", "transformers")
"""Used by every worker, so their versions are always reported."""
CUDA_DEFAULTS = {"PYTORCH_ALLOC_CONF": "expandable_segments:False", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
"""Defaults of torch and CUDA if these variables aren't set."""


def import_packages(packages: Iterable[str]) -> dict[str, str]:
    """Import the packages of the worker's header, and return the version of each."""
    versions = {}
    with keep_cuda_defaults():
        for package in packages:
            distribution = importlib.metadata.distribution(package)
            importlib.import_module(_module_name(distribution))
            versions[package] = distribution.version
    return versions


@contextmanager
def keep_cuda_defaults() -> Iterator[None]:
    """In this context no package can choose torch's allocator or the order of GPUs, as gptqmodel would.

    That worker's memory would not be comparable with the others', and might be another GPU's. gptqmodel
    respects variables that are set; torch reads them again at its first allocation, which is later.
    """
    configured = os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or CUDA_DEFAULTS["PYTORCH_ALLOC_CONF"]
    wanted = CUDA_DEFAULTS | {"PYTORCH_ALLOC_CONF": configured}
    unset = [name for name in wanted if not os.environ.get(name)]
    os.environ.update({name: wanted[name] for name in unset})
    try:
        yield
    finally:
        for name in unset:
            del os.environ[name]


def ready_frame(device: Device, versions: dict[str, str]) -> Ready:
    """This worker's process, Python, packages and device."""
    return Ready(
        pid=os.getpid(),
        at_ns=time.monotonic_ns(),
        python=platform.python_version(),
        versions=versions,
        device=str(device.torch),
        device_name=device.name,
        device_uuid=device.uuid,
        cuda_visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        cuda_device_order=os.environ.get("CUDA_DEVICE_ORDER"),
        allocator_settings=os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
    )


def _module_name(distribution: importlib.metadata.Distribution) -> str:
    """Module to import for a distribution: `awq` for autoawq, usually just its name."""
    name = distribution.name.replace("-", "_")
    modules = (distribution.read_text("top_level.txt") or "").split() or _owned_modules(distribution)
    return name if name in modules or not modules else modules[0]


def _owned_modules(distribution: importlib.metadata.Distribution) -> list[str]:
    """Top-level modules in its list of files, for build tools that don't declare them."""
    tops = (file.parts[0] for file in distribution.files or [] if file.suffix == ".py")
    return sorted({top.removesuffix(".py") for top in tops if top.removesuffix(".py").isidentifier()})
