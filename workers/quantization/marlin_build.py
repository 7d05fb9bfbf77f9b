"""Marlin's kernels, which GPTQModel ships as CUDA sources: compiled once, in GPTQModel's own build folder.

A note in qbench's cache records the versions and the path of the library, so that a worker can check without
importing torch. GPTQModel identifies its library by more than that, including the GPU's compute capability
and compiler flags; if one of those changes, it compiles while the model loads.
"""

import importlib.metadata
import shutil
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from schemas.job import Job
from workers.protocol.backend import Report
from workers.protocol.errors import Unsupported

EXTENSION = "marlin_fp16"
PROGRESS_INTERVAL_S = 1.0


def is_built(job: Job) -> bool:
    note = _note(job)
    return note.exists() and Path(note.read_text()).exists()


def build(job: Job, report: Report) -> None:
    """Compile Marlin for FP16 with nvcc, which takes minutes. Raises `Unsupported` if there is no nvcc."""
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None and shutil.which("nvcc") is None:
        raise Unsupported(
            "Marlin is distributed as CUDA sources, and there is no nvcc to compile them",
            "install the CUDA toolkit for torch's CUDA version, or set CUDA_HOME to it",
        )
    from gptqmodel import extension
    from gptqmodel.utils.marlin import _MARLIN_FP16_TORCH_OPS_EXTENSION as marlin

    folder, sources = marlin.build_root(), len(marlin.sources())
    with ThreadPoolExecutor(1) as thread:
        compiling = thread.submit(extension.load, EXTENSION)
        while not compiling.done():
            report("compiling Marlin's kernels", len(list(folder.glob("*.o"))), sources)
            wait([compiling], PROGRESS_INTERVAL_S)
    if error := compiling.exception():
        raise RuntimeError(" ".join(str(error).split())) from error
    _note(job).parent.mkdir(parents=True, exist_ok=True)
    _note(job).write_text(str(next(folder.glob("*.so"))))


def _note(job: Job) -> Path:
    versions = (importlib.metadata.version(name) for name in ("torch", "gptqmodel"))
    return Path(job.cache_folder) / "marlin" / "-".join([EXTENSION, *versions])
