"""What a worker says once its packages are imported and its device answers."""

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
"""What every worker measures with, so that its versions are told whatever the header names."""
CUDA_DEFAULTS = {"PYTORCH_ALLOC_CONF": "expandable_segments:False", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
"""What torch and CUDA do where these variables aren't set."""


def import_packages(packages: Iterable[str]) -> dict[str, str]:
    """Import what the worker's header names, and tell the version of each."""
    versions = {}
    with _cuda_defaults_kept():
        for package in packages:
            distribution = importlib.metadata.distribution(package)
            importlib.import_module(_module_name(distribution))
            versions[package] = distribution.version
    return versions


@contextmanager
def _cuda_defaults_kept() -> Iterator[None]:
    """Let no package choose torch's allocator and the order of GPUs for this process, as gptqmodel does.

    Its worker's memory could not be compared with the others', and might be another GPU's. gptqmodel leaves
    alone what is set; torch looks again when it first allocates, which is later.
    """
    usual = os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or CUDA_DEFAULTS["PYTORCH_ALLOC_CONF"]
    held = CUDA_DEFAULTS | {"PYTORCH_ALLOC_CONF": usual}
    unset = [name for name in held if not os.environ.get(name)]
    os.environ.update({name: held[name] for name in unset})
    try:
        yield
    finally:
        for name in unset:
            del os.environ[name]


def ready_frame(device: Device, versions: dict[str, str]) -> Ready:
    """Who this worker is, under which Python, with which packages, and on which device."""
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
    """What to import for a distribution: `awq` for autoawq, most often just its name."""
    name = distribution.name.replace("-", "_")
    declared = (distribution.read_text("top_level.txt") or "").split() or _owned_modules(distribution)
    return name if name in declared or not declared else declared[0]


def _owned_modules(distribution: importlib.metadata.Distribution) -> list[str]:
    """The same from its list of files: newer build tools declare no modules."""
    tops = (file.parts[0] for file in distribution.files or [] if file.suffix == ".py")
    return sorted({top.removesuffix(".py") for top in tops if top.removesuffix(".py").isidentifier()})
