"""A simulated GPU for machines without one: `fake_nvml.c`, compiled once per test session.

A process started with `FakeNvml.env()` loads that library instead of NVIDIA's, through pynvml, and sees the
GPUs that `FakeNvml.write()` described last. The C file documents the format.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
GPU_UUID = "GPU-11111111-2222-3333-4444-555555555555"

ONE_GPU = f"""\
driver 580.95.05
device {GPU_UUID} Fake H100 80GB
total 85899345920
reserved 500000000
used 1000000
sm_clock 1980
memory_clock 2619
temperature 45
power_mw 350500
clock_reasons 0
violation_power_ns 2500000000
violation_thermal_ns 0
"""


PRELUDE = f"""\
import os, subprocess, sys, threading, time
from pathlib import Path
import msgspec
from orchestrator.hardware.nvml import Nvml, NvmlUnavailable
from orchestrator.hardware.sampler import MemorySampler, NvmlSource, ResidentSetSource

UUID = {GPU_UUID!r}

def write_state(text):
    state = Path(os.environ["FAKE_NVML_STATE"])
    draft = state.with_suffix(".draft")
    draft.write_text(text)
    draft.replace(state)  # atomically, as in FakeNvml.write: the sampler is reading it

def wait_until(holds, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert holds()

"""

SHOW = "\nprint(msgspec.json.encode(answer).decode())\n"


# What `Nvml.state` returns for ONE_GPU: without the counters, and the counters.
STATE = {
    "sm_clock_mhz": 1980,
    "memory_clock_mhz": 2619,
    "temperature_c": 45,
    "power_w": 350.5,
    "clock_limits": [],
    "power_limited_s": None,
    "thermal_limited_s": None,
}
COUNTERS = {"power_limited_s": 2.5, "thermal_limited_s": 0.0}

WATCHED = """
print("up", flush=True)
input()
block = b"x" * 64_000_000
print("full", flush=True)
input()
"""

START_WATCHED = f"""\
pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
worker = subprocess.Popen([sys.executable, "-c", {WATCHED!r}, "workers.fake"], **pipes)
worker.stdout.readline()  # before, it may not have its command line yet
"""
"""A process to watch; it allocates 64 MB when it is sent a line."""


@dataclass(frozen=True)
class FakeNvml:
    """The compiled library, and the state file of one test."""

    library_folder: Path
    state_file: Path

    def write(self, state: str) -> None:
        """Replace the description of the GPUs by `state`, atomically for readers."""
        draft = self.state_file.with_suffix(".draft")
        draft.write_text(state)
        draft.replace(self.state_file)

    def env(self) -> dict[str, str]:
        """This process's environment variables, with those of the library and the state file."""
        library_path = [str(self.library_folder), *os.environ.get("LD_LIBRARY_PATH", "").split(":")]
        return os.environ | {
            "LD_LIBRARY_PATH": ":".join(filter(None, library_path)),
            "FAKE_NVML_STATE": str(self.state_file),
        }


def build(folder: Path) -> None:
    """Compile `libnvidia-ml.so.1` into `folder`; skips the test without a C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (gcc or cc) to build the fake NVML with")
    folder.mkdir()
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra"]
    source = Path(__file__).with_suffix(".c")
    subprocess.run([compiler, *flags, "-o", folder / "libnvidia-ml.so.1", source], check=True)


@pytest.fixture(name="fake_nvml")
def fake_nvml_fixture(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> FakeNvml:
    """One idle GPU; `write()` changes it."""
    folder = tmp_path_factory.getbasetemp() / "fake-nvml"  # compiled by the first test that needs it
    if not folder.exists():
        build(folder)
    fake = FakeNvml(folder, tmp_path / "nvml-state.txt")
    fake.write(ONE_GPU)
    return fake


def answer_of(fake: FakeNvml, script: str) -> Any:
    """Run `script` in a fresh process that sees the fake GPU."""
    command = [sys.executable, "-c", PRELUDE + script + SHOW]
    done = subprocess.run(command, cwd=ROOT, env=fake.env(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def nvml_answer(fake: FakeNvml, expression: str) -> Any:
    return answer_of(fake, f"with Nvml.open() as nvml:\n    answer = {expression}")
