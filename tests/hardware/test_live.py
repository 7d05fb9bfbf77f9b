"""Watching a program that does not use qbench: real processes, a fake NVML, a fake torch."""

import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import msgspec
import psutil
import pytest
from fake_nvml import ONE_GPU, FakeNvml
from golden_text import Golden

from orchestrator.errors import BadInput
from orchestrator.hardware.live import LiveReading, watch

MIB = 2**20

TORCH = f"""
class cuda:
    is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 2)
    memory_stats = staticmethod(lambda device: {{
        "allocated_bytes.all.current": (device + 1) * 100 * {MIB},
        "reserved_bytes.all.current": (device + 1) * 150 * {MIB},
    }})
"""

PROGRAM = f"""
import os, sys, time
from pathlib import Path
state = {ONE_GPU!r} + f"process {{os.getpid()}} {600 * MIB}\\n"
Path(os.environ["FAKE_NVML_STATE"]).write_text(state)
import torch
print(sys.argv[1:], os.environ.get("CUSTOMIZED"), flush=True)
deadline_s = time.monotonic() + 60
while not Path(__file__).with_name("observed").exists() and time.monotonic() < deadline_s:
    time.sleep(0.05)
"""

# What a user's command does: open NVML, watch, print. argv: target, and a file to create once there are two
# readings with every figure that can be known.
WATCHER = """
import sys
from pathlib import Path
import msgspec
from orchestrator.hardware.live import watch
from orchestrator.hardware.nvml import Nvml
target, observed = sys.argv[1:]
with Nvml.open() as nvml:
    for index, reading in enumerate(watch(target, nvml)):
        print(msgspec.json.encode(reading).decode(), flush=True)
        if index and reading.process_bytes and (reading.allocated_bytes or target.isdecimal()):
            Path(observed).touch()
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path / "program.py"


def watched(fake: FakeNvml, target: str, folder: Path, **variables: str) -> tuple[list[LiveReading], str]:
    """Readings of a program, in `folder` if it has a file, and what it printed."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", WATCHER, target, folder / "observed"],
        cwd=root,
        env=fake.env() | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    readings = [msgspec.json.decode(line, type=LiveReading) for line in lines if line.startswith("{")]
    return readings, "\n".join(line for line in lines if not line.startswith("{"))


def test_nvml_and_torch_figures_of_an_unmodified_program(fake_nvml: FakeNvml, program: Path) -> None:
    readings, printed = watched(fake_nvml, f"{sys.executable} {program} --epochs 3", program.parent)
    assert "['--epochs', '3'] None" in printed
    last = readings[-1]
    assert last.process_bytes == 600 * MIB
    assert (last.allocated_bytes, last.reserved_bytes) == (300 * MIB, 450 * MIB)
    assert last.outside_torch_bytes == 150 * MIB
    times = [reading.at_ns for reading in readings]
    assert len(times) >= 2
    assert all(later - earlier >= 0.5e9 for earlier, later in pairwise(times))


def test_the_users_own_sitecustomize_still_runs(fake_nvml: FakeNvml, program: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "sitecustomize.py").write_text("import os\nos.environ['CUSTOMIZED'] = 'yes'\n")
    readings, printed = watched(fake_nvml, f"{sys.executable} {program}", program.parent, PYTHONPATH=str(own))
    assert "[] yes" in printed
    assert readings[-1].reserved_bytes == 450 * MIB


def test_a_program_already_running_has_no_torch_figures(fake_nvml: FakeNvml, program: Path) -> None:
    with subprocess.Popen([sys.executable, program], env=fake_nvml.env(), stdout=subprocess.PIPE) as running:
        assert running.stdout
        running.stdout.readline()
        readings, _ = watched(fake_nvml, str(running.pid), program.parent)
    assert readings[-1].process_bytes == 600 * MIB
    assert readings[-1].allocated_bytes is None
    assert readings[-1].outside_torch_bytes is None


def test_a_program_that_uses_no_gpu_has_a_reason(golden: Golden, fake_nvml: FakeNvml, tmp_path: Path) -> None:
    readings, _ = watched(fake_nvml, f"{sys.executable} -c 'import time; time.sleep(1.5)'", tmp_path)
    assert readings
    assert readings[-1].process_bytes is None
    golden(str(readings[-1].reason))


def test_the_command_prints_what_changes_and_the_peaks(fake_nvml: FakeNvml, program: Path) -> None:
    command = Path(sys.executable).with_name("qbench-memory")
    target = f"{sys.executable} {program}"
    figures = "NVML process 600, torch allocated 300, torch reserved 450, outside torch 150"
    with subprocess.Popen(
        [command, "--live", target], env=fake_nvml.env(), stdout=subprocess.PIPE, text=True
    ) as watching:
        assert watching.stdout
        printed = []
        for line in watching.stdout:
            printed.append(line.rstrip("\n"))
            if line.endswith(f"s  {figures}\n"):
                program.with_name("observed").touch()
    assert watching.returncode == 0
    assert [line.endswith(f"s  {figures}") for line in printed].count(True) == 1
    assert printed[-1] == f"peak, MiB: {figures}"


def first(readings: Iterator[LiveReading]) -> LiveReading:
    return next(readings)


@pytest.mark.parametrize("target", ["no-such-program --x", str(2**22 + 7)])
def test_bad_targets(golden: Golden, target: str) -> None:
    with pytest.raises(BadInput) as caught:
        first(watch(target, None))
    assert (caught.value.option, caught.value.value) == ("--live", target)
    golden(str(caught.value))


def test_a_program_is_terminated_when_watching_stops(golden: Golden) -> None:
    others = set(psutil.Process().children())  # workers that other tests share
    readings = watch(f"{sys.executable} -c 'import time; time.sleep(60)'", None)
    golden(str(first(readings).reason))
    (program,) = set(psutil.Process().children()) - others
    readings.close()  # type: ignore[attr-defined]
    assert not program.is_running()


def test_memory_outside_torch_is_unknown_if_torchs_figure_is_stale() -> None:
    """Memory was freed after torch reported and before NVML was read."""
    assert LiveReading(at_ns=0, process_bytes=600, reserved_bytes=450).outside_torch_bytes == 150
    assert LiveReading(at_ns=0, process_bytes=100, reserved_bytes=450).outside_torch_bytes is None
