"""`python -m orchestrator.precisions.bundle FOLDER`: the packages that a GPU machine without a network lacks.

Such a machine is often a container with torch and transformers for its driver, and no way to install more.
What the workers need beyond that is small and goes into one folder, to be copied there next to the checkout.
The folder goes on PYTHONPATH, so nothing in the container is replaced.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from orchestrator.errors import BadInput, QbenchError
from orchestrator.precisions.availability import SCHEMAS_NEED
from orchestrator.precisions.catalog import find_precisions
from orchestrator.precisions.uv_program import uv_program

PYTHON = "3.12"
PLATFORM = "x86_64-manylinux_2_28"

ON_THE_GPU_MACHINE = {"torch", "triton", "transformers", "accelerate"}
"""Packages in worker headers that its image ships, built for its driver."""

EXCLUDED = {"gptqmodel"}
"""It needs pypcre, which is published only as C source and is compiled for one Python and one libpcre2."""

IN_NO_HEADER = [SCHEMAS_NEED, "dill", "multiprocess", "termcolor"]
"""autoawq imports `datasets`, which imports `dill` and `multiprocess` at once; hqq imports `termcolor`."""

SOURCES_ONLY = {"autoawq", "gemlite", "hqq"}
"""Published without wheels. They are pure Python, so wheels built here work there."""

KEPT_BITSANDBYTES = {"libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so"}
"""Two of the builds for nine toolkits in its wheel: 4.5 MB instead of 120."""

UNNEEDED = ["bin", "test", "*/tests", "torchao/_C*.so"]
"""torchao's wheel ships a package `test`, which would shadow Python's own, and 13.5 MB of libraries with
kernels for formats that no worker uses; it imports without them."""

MOST_BYTES = 40_000_000


def bundled_requirements() -> list[str]:
    """The requirements to bundle: the workers' packages, except those the GPU machine has or must compile."""
    headers = [need for precision in find_precisions().values() for need in precision.requirements]
    wanted = dict.fromkeys([*headers, *IN_NO_HEADER])
    return [need for need in wanted if _name(need) not in ON_THE_GPU_MACHINE | EXCLUDED]


def write_bundle(folder: Path) -> int:
    """Fill `folder`, which must be empty or absent, and return its size in bytes.

    Raises `BadInput` for a folder in use, and `QbenchError` if uv fails or the size is over the limit.
    """
    if folder.exists() and any(folder.iterdir()):
        raise BadInput("FOLDER", str(folder), "is not empty", "Remove it, or name another")
    command = [uv_program(), "pip", "install", "--no-deps", "--only-binary", ":all:"]
    command += [f"--no-binary={name}" for name in sorted(SOURCES_ONLY)]
    command += ["--python", sys.executable, "--python-version", PYTHON, "--python-platform", PLATFORM]
    if subprocess.run([*command, "--target", str(folder), *bundled_requirements()]).returncode:
        raise QbenchError("uv pip install failed; its reason is above")
    _trim(folder)
    return _checked_size(folder)


def _trim(folder: Path) -> None:
    for library in folder.glob("bitsandbytes/libbitsandbytes_*.so"):
        if library.name not in KEPT_BITSANDBYTES:
            library.unlink()
    for pattern in [*UNNEEDED, "**/__pycache__"]:
        for unneeded in folder.glob(pattern):
            shutil.rmtree(unneeded) if unneeded.is_dir() else unneeded.unlink()


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
    """Write the bundle that `sys.argv` names; exit with one line if that fails."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m orchestrator.precisions.bundle FOLDER")
    folder = Path(sys.argv[1])
    try:
        size_bytes = write_bundle(folder)
    except QbenchError as error:
        sys.exit(str(error))
    print(f"{folder}: {size_bytes / 1e6:.1f} MB. Next to the checkout on the GPU machine:")
    print(f"PYTHONPATH={folder} python3 -m orchestrator --all")


if __name__ == "__main__":
    main()
