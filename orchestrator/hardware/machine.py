"""The machine that a run is measured on, described once per run."""

import os
import platform
import subprocess
from pathlib import Path

import psutil

from orchestrator import __version__
from orchestrator.hardware.nvml import Nvml
from schemas.environment import Environment

PROJECT = Path(__file__).resolve().parents[2]


def describe_machine(nvml: Nvml | None, gpu_reason: str | None) -> Environment:
    """Host, driver and GPUs; `gpu_reason` is the reason why `nvml` is None."""
    return Environment(
        qbench=__version__,
        commit=_commit(),
        python=platform.python_version(),
        platform=platform.platform(),
        cpu=_cpu_name(),
        cpu_count=os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        gpus=nvml.gpus() if nvml else [],
        gpu_reason=gpu_reason,
        driver=nvml.driver if nvml else None,
    )


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _commit() -> str | None:
    """The checkout's commit; QBENCH_COMMIT names it if the tree was copied without its history."""
    if "QBENCH_COMMIT" in os.environ:
        return os.environ["QBENCH_COMMIT"]
    if not (PROJECT / ".git").exists():
        return None
    command = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
