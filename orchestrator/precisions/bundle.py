"""`python -m orchestrator.precisions.bundle FOLDER`: the packages that a GPU machine without a network lacks.

Such a machine often comes as a container with torch and transformers for its driver, and no way to
install more. What the workers need beyond that is small and goes into one folder to copy there beside
the checkout. The folder goes on PYTHONPATH, so nothing in the container is replaced.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from orchestrator.errors import BadInput, QbenchError
from orchestrator.precisions.availability import SCHEMAS_NEED
from orchestrator.precisions.catalog import find_precisions

PYTHON = "3.12"
PLATFORMS = [
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_24_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
]
"""pip tries the names it is given and no older ones, so each is named."""

ON_THE_GPU_MACHINE = {"torch", "triton", "transformers", "accelerate"}
"""Of what worker headers name, what its image has built for its driver."""

LEFT_OUT = {"gptqmodel"}
"""It needs pypcre, which is published as C sources alone and is compiled for one Python and one libpcre2."""

NAMED_BY_NO_HEADER = [SCHEMAS_NEED, "dill", "multiprocess", "termcolor"]
"""`dill` and `multiprocess` are what `datasets` imports at once, and autoawq imports `datasets`; `termcolor`
is what hqq imports."""

NO_WHEEL_ON_THE_INDEX = {"autoawq", "gemlite", "hqq"}
"""Published as sources alone. They are pure Python, so wheels built here fit there."""

KEPT_BITSANDBYTES = {"libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so"}
"""Of the builds for nine toolkits in its wheel: 4.5 MB instead of 120."""

NEEDLESS = ["bin", "test", "*/tests", "torchao/_C*.so"]
"""torchao's wheel brings a package `test`, which would hide Python's own, and 13.5 MB of libraries with
kernels of formats that no worker has; it imports without them."""

MOST_BYTES = 40_000_000


def bundled_requirements() -> list[str]:
    """What goes into the folder: the workers' packages, less what the GPU machine has or has to compile."""
    headers = [need for precision in find_precisions().values() for need in precision.requirements]
    wanted = dict.fromkeys([*headers, *NAMED_BY_NO_HEADER])
    return [need for need in wanted if _name(need) not in ON_THE_GPU_MACHINE | LEFT_OUT]


def write_bundle(folder: Path) -> int:
    """Fill `folder`, which must not exist or be empty, and return its size in bytes.

    Raises `BadInput` for a folder in use, and `QbenchError` where pip fails or the size is over the limit.
    """
    if folder.exists() and any(folder.iterdir()):
        raise BadInput("FOLDER", str(folder), "is not empty", "Remove it, or name another")
    requirements = bundled_requirements()
    with tempfile.TemporaryDirectory(prefix="qbench-") as wheels:
        built = [need for need in requirements if _name(need) in NO_WHEEL_ON_THE_INDEX]
        _pip("wheel", "--no-deps", "--wheel-dir", wheels, *built)
        _pip("install", "--no-deps", "--find-links", wheels, *_target(folder), *requirements)
    _trim(folder)
    return _checked_size(folder)


def _target(folder: Path) -> Iterator[str]:
    yield from ("--target", str(folder), "--only-binary", ":all:")
    yield from ("--implementation", "cp", "--python-version", PYTHON)
    for platform in PLATFORMS:
        yield from ("--platform", platform)


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", *arguments]
    if subprocess.run(command).returncode:
        raise QbenchError(f"pip {arguments[0]} failed; what it said is above")


def _trim(folder: Path) -> None:
    for library in folder.glob("bitsandbytes/libbitsandbytes_*.so"):
        if library.name not in KEPT_BITSANDBYTES:
            library.unlink()
    for pattern in [*NEEDLESS, "**/__pycache__"]:
        for needless in folder.glob(pattern):
            shutil.rmtree(needless) if needless.is_dir() else needless.unlink()


def _checked_size(folder: Path) -> int:
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    total = sum(sizes.values())
    if total > MOST_BYTES:
        largest = max(sizes, key=lambda path: sizes[path]).relative_to(folder)
        sizes_mb = f"{total / 1e6:.0f} MB, over the limit of {MOST_BYTES / 1e6:.0f} MB"
        raise QbenchError(f"{folder} has {sizes_mb}; its largest file is {largest}")
    return total


def _name(requirement: str) -> str:
    return canonicalize_name(Requirement(requirement).name)


def main() -> None:
    """Write the bundle that `sys.argv` names; end with one line where that fails."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m orchestrator.precisions.bundle FOLDER")
    folder = Path(sys.argv[1])
    try:
        size_bytes = write_bundle(folder)
    except QbenchError as error:
        sys.exit(str(error))
    print(f"{folder}: {size_bytes / 1e6:.1f} MB. Beside the checkout on the GPU machine:")
    print(f"PYTHONPATH={folder} python3 -m orchestrator --all")


if __name__ == "__main__":
    main()
