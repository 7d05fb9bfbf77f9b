"""A run on a GPU, told without one: a fake NVML, and workers that claim to be on the GPU it plays.

Everything between is real: the parent's NVML session through pynvml, the worker processes and their pipes,
the sampler's thread, and what becomes of it all in records, tables and warnings.
"""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from commands import command, environment, run
from fake_nvml import GPU_UUID, ONE_GPU, FakeNvml, fake_nvml_fixture  # noqa: F401
from records import MIB, make_run

from orchestrator.memory import phase_memory
from orchestrator.metrics import measure_cell
from orchestrator.store import read_run
from orchestrator.warnings import run_warnings
from schemas.frames import Done, Failed
from schemas.record import CellRecord

ROOT = Path(__file__).parent.parent

# The parent: one cell by hand, its record on stdout. argv: interpreter, folder that holds `workers/`, run.
PARENT = f"""
import sys
from pathlib import Path
import msgspec
from rich.console import Console
from orchestrator.interpreter import Interpreter
from orchestrator.nvml import Nvml
from orchestrator.plan import Cell
from orchestrator.precisions import Precision
from orchestrator.progress import Watcher
from orchestrator.run import Worker
from orchestrator.store import RunFolder
sys.path.insert(0, {str(Path(__file__).parent)!r})
from records import make_job

python, lent, run = sys.argv[1:]
Path(run, "logs").mkdir(parents=True)
precision = Precision(
    name="fp16", module="workers.play", path=Path(lent) / "workers/play.py", label="FP16",
    bits_per_weight=16, devices=["cuda"], requirements=[], summary="plays a worker",
)
cell = Cell(precision, Interpreter(python, own=True), make_job(device="cuda:0"), None)
watcher, folder = Watcher(Console(stderr=True), 1), RunFolder(Path(run))
with Nvml.open() as nvml, Worker(cell, Path(lent), folder, watcher, nvml, 30) as worker:
    record = worker.measure(cell)
print(msgspec.json.encode(record).decode())
assert "torch" not in sys.modules
"""

# The worker: no torch, but frames as a CUDA worker sends them, and a hand on what the fake NVML shows.
WORKER = f"""
import json, os, sys, time
from pathlib import Path

MIB = 2**20
GPU = {ONE_GPU.replace("used 1000000", "")!r}

def show(used, process=None, more=""):
    state = Path(os.environ["FAKE_NVML_STATE"])
    draft = state.with_suffix(".worker-draft")
    line = "" if process is None else f"process {{os.getpid()}} {{process}}\\n"
    draft.write_text(f"{{GPU}}used {{used}}\\n{{line}}{{more}}")
    draft.replace(state)

def say(frame, **fields):
    sys.stdout.write(json.dumps({{"frame": frame, **fields}}) + "\\n")
    sys.stdout.flush()

def enter(name, allocated=None, reserved=None, peak=None, trial=None):
    torch = None
    if allocated is not None:
        torch = dict(
            requested_bytes=allocated, allocated_bytes=allocated, active_bytes=allocated,
            inactive_split_bytes=0, reserved_bytes=reserved, peak_allocated_bytes=peak or allocated,
            peak_reserved_bytes=reserved,
        )
    say("phase", name=name, at_ns=time.monotonic_ns(), trial=trial, torch=torch)
    sys.stdin.readline()

def ready():
    say("ready", pid=os.getpid(), at_ns=time.monotonic_ns(), python="3.12", versions={{"torch": "2"}},
        device="cuda:0", device_name="Fake H100 80GB", device_uuid={GPU_UUID!r})

def trial(index):
    say("trial", index=index, batch_size=1, prompt_tokens=8, new_tokens=3, prefill_s=0.1, decode_s=0.2,
        token_s=[0.1, 0.1], enqueue_s=0.1, token_ids=[1, 2, 3])

def done():
    say("done", at_ns=time.monotonic_ns(), trials_planned=1, trials_measured=1, sample_text=None)

job = json.loads(sys.stdin.readline())
time.sleep(0.3)  # as long as imports take, and more than the parent needs to read the idle GPU
enter("start")
enter("context")
"""

WHOLE_LIFE = """
show(600 * MIB, 512 * MIB)
ready()
enter("load", 0, 0)
show(9000 * MIB, 8900 * MIB)  # what loading took for a moment
time.sleep(0.4)
show(1600 * MIB, 1500 * MIB)
enter("warmup", 900 * MIB, 1000 * MIB, peak=1200 * MIB)
show(1700 * MIB, 1600 * MIB)
enter("prefill", 910 * MIB, 1050 * MIB, trial=0)
enter("decode", 920 * MIB, 1050 * MIB, peak=1020 * MIB, trial=0)
trial(0)
enter("end", 915 * MIB, 1050 * MIB, peak=940 * MIB)
done()
"""

LOST_MIDWAY = """
show(600 * MIB, 512 * MIB)
ready()
enter("load", 0, 0)
time.sleep(0.3)
show(600 * MIB, 512 * MIB, "lost 1\\n")
time.sleep(0.3)
enter("warmup", 900 * MIB, 1000 * MIB)
enter("prefill", 900 * MIB, 1000 * MIB, trial=0)
enter("decode", 900 * MIB, 1000 * MIB, trial=0)
trial(0)
enter("end", 900 * MIB, 1000 * MIB)
done()
"""


def play(fake: FakeNvml, folder: Path, life: str, python: str = sys.executable) -> CellRecord:
    """Run a worker that lives `life` as one cell, in a parent that sees the fake GPU."""
    (folder / "workers").mkdir()
    (folder / "workers" / "__init__.py").touch()
    (folder / "workers" / "play.py").write_text(WORKER + life)
    argv = [sys.executable, "-c", PARENT, python, str(folder), str(folder / "run")]
    done = subprocess.run(argv, cwd=ROOT, env=fake.env(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr + (folder / "run/logs/fp16.log").read_text()
    return msgspec.json.decode(done.stdout, type=CellRecord)


def test_both_views_of_memory_meet_at_the_edges(fake_nvml: FakeNvml, tmp_path: Path) -> None:
    cell = play(fake_nvml, tmp_path, WHOLE_LIFE)
    assert isinstance(cell.outcome, Done)
    assert cell.baseline_device_bytes == 1_000_000
    assert [edge.reading for edge in cell.edges[:2]] == [None, None]  # before Ready, no one knows which GPU
    seen = [
        (edge.phase.name, edge.reading.process_bytes, edge.reading.device_bytes)
        for edge in cell.edges
        if edge.reading
    ]
    assert seen == [
        ("load", 512 * MIB, 600 * MIB),
        ("warmup", 1500 * MIB, 1600 * MIB),
        ("prefill", 1600 * MIB, 1700 * MIB),
        ("decode", 1600 * MIB, 1700 * MIB),
        ("end", 1600 * MIB, 1700 * MIB),
    ]
    for edge in cell.edges[2:]:
        assert edge.reading is not None
        assert edge.reading.at_ns > edge.phase.at_ns  # read while the worker stood still, not before


def test_figures_and_samples_follow(fake_nvml: FakeNvml, tmp_path: Path) -> None:
    cell = play(fake_nvml, tmp_path, WHOLE_LIFE)
    row = measure_cell(cell)
    assert (row.loaded_bytes, row.footprint_bytes) == (900 * MIB, 900 * MIB)
    assert (row.peak_bytes, row.nvml_peak_bytes) == (1020 * MIB, 1600 * MIB)
    phases = {phase.phase: phase for phase in phase_memory(cell)}
    assert phases["load"].outside_torch_bytes == 500 * MIB
    assert phases["load"].device_bytes == 1600 * MIB
    assert phases["load"].sampled_peak_bytes == 9000 * MIB  # seen by the samples alone, between two edges
    assert len(cell.samples) >= 4
    assert {sample.process_bytes for sample in cell.samples} == {None}
    assert cell.sampler is not None
    assert (cell.sampler.source, cell.sampler.samples) == ("nvml", len(cell.samples))
    assert run_warnings(make_run(cell)) == []


def test_a_launchers_worker_is_found_by_the_pid_it_tells(fake_nvml: FakeNvml, tmp_path: Path) -> None:
    launcher = tmp_path / "python"
    launcher.write_text(f'#!/bin/sh\n"{sys.executable}" "$@"\nexit $?\n')
    launcher.chmod(0o755)
    cell = play(fake_nvml, tmp_path, WHOLE_LIFE, str(launcher))
    assert measure_cell(cell).nvml_peak_bytes == 1600 * MIB


def test_a_hidden_pid_is_a_reason_and_a_warning(fake_nvml: FakeNvml, tmp_path: Path) -> None:
    hidden = WHOLE_LIFE.replace("512 * MIB)", "None)").replace(", 8900 * MIB", "").replace(", 1500 * MIB", "")
    cell = play(fake_nvml, tmp_path, hidden.replace(", 1600 * MIB", ""))
    readings = [edge.reading for edge in cell.edges if edge.reading]
    assert len(readings) == 5
    for reading in readings:
        assert reading.process_bytes is None
        assert reading.device_bytes is not None
        assert "a container hides pids" in str(reading.reason)
    row = measure_cell(cell)
    assert row.nvml_peak_bytes is None
    assert row.decode_tok_s == pytest.approx(10)
    (line,) = run_warnings(make_run(cell))
    assert line.startswith("fp16: NVML process bytes are missing: NVML lists no process")


def test_a_gpu_lost_midway_is_a_reason_and_the_cell_goes_on(fake_nvml: FakeNvml, tmp_path: Path) -> None:
    cell = play(fake_nvml, tmp_path, LOST_MIDWAY)
    assert isinstance(cell.outcome, Done)
    assert len(cell.trials) == 1
    load, *later = [edge.reading for edge in cell.edges if edge.reading]
    assert (load.process_bytes, load.device_bytes) == (512 * MIB, 600 * MIB)
    for reading in later:
        assert reading.process_bytes is reading.device_bytes is None
        assert "the GPU is lost" in str(reading.reason)
    kinds = [sample.device_bytes is None for sample in cell.samples]
    assert kinds == sorted(kinds)  # first figures, then reasons
    assert {False, True} == set(kinds)
    assert any("the GPU is lost" in line for line in run_warnings(make_run(cell)))


def test_a_worker_killed_on_the_gpu_keeps_what_was_seen(fake_nvml: FakeNvml, tmp_path: Path) -> None:
    life = "show(600 * MIB, 512 * MIB)\nready()\nenter('load', 0, 0)\nos.kill(os.getpid(), 9)\n"
    cell = play(fake_nvml, tmp_path, life)
    assert isinstance(cell.outcome, Failed)
    assert "SIGKILL" in cell.outcome.message
    assert cell.ready is not None
    assert cell.baseline_device_bytes == 1_000_000
    assert cell.edges[-1].reading is not None
    assert cell.edges[-1].reading.process_bytes == 512 * MIB


def test_a_worker_dead_at_a_phase_edge_is_a_row(fake_nvml: FakeNvml, tmp_path: Path) -> None:
    """It is gone before the parent could let it go on: the answer finds no reader."""
    life = "say('phase', name='load', at_ns=1)\nos.kill(os.getpid(), 9)\n"
    cell = play(fake_nvml, tmp_path, life)
    assert isinstance(cell.outcome, Failed)
    assert "SIGKILL" in cell.outcome.message


# Through the command, with a real CPU build of torch


@pytest.fixture
def gpu_environment(fake_nvml: FakeNvml, cache: Path) -> dict[str, str]:
    return environment(cache) | {
        name: value for name, value in fake_nvml.env().items() if os.environ.get(name) != value
    }


def test_auto_takes_the_gpu(gpu_environment: dict[str, str], tmp_path: Path) -> None:
    argv = command("orchestrate", "-p", "fp16", "--model", "random:qwen2.5-0.5b", "--dry-run")
    done = run(argv, tmp_path, gpu_environment)
    assert "random-qwen2.5-0.5b on cuda:0" in done.stdout
    assert "budget" not in done.stdout  # a GPU needs none


def test_there_is_no_second_gpu(gpu_environment: dict[str, str], tmp_path: Path) -> None:
    argv = command("orchestrate", "-p", "fp16", "--model", "random:qwen2.5-0.5b", "--device", "cuda:1")
    done = run(argv, tmp_path, gpu_environment)
    assert done.returncode == 2
    assert "--device cuda:1: there is no such device: only 1 GPU" in done.stderr


@pytest.mark.slow
def test_a_cpu_run_beside_a_gpu_lists_it(
    gpu_environment: dict[str, str], tmp_path: Path, tiny_llama: Path
) -> None:
    options = ["--model", str(tiny_llama), "--new-tokens", "2", "--device", "cpu", "--out", "run"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n")
    argv = command("orchestrate", "-p", "fp16", *options, "--prompts", prompts)
    done = run(argv, tmp_path, gpu_environment)
    assert done.returncode == 0, done.stderr
    measured = read_run(tmp_path / "run")
    (gpu,) = measured.environment.gpus
    assert (gpu.uuid, gpu.name, measured.environment.driver) == (GPU_UUID, "Fake H100 80GB", "580.95.05")
    (cell,) = measured.cells
    assert cell.baseline_device_bytes is None
    assert cell.sampler is not None
    assert cell.sampler.source == "resident-set"
    assert "no NVIDIA GPU was used: memory is the resident set" in done.stdout


@pytest.mark.slow
def test_a_torch_that_sees_no_gpu_is_a_failed_row(
    gpu_environment: dict[str, str], tmp_path: Path, tiny_llama: Path
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this torch sees a real GPU")
    argv = command("orchestrate", "-p", "fp16", "--model", tiny_llama, "--device", "cuda", "--out", "run")
    done = run(argv, tmp_path, gpu_environment)
    assert done.returncode == 1
    eager, graph = read_run(tmp_path / "run").cells
    assert eager.outcome == graph.outcome
    assert isinstance(eager.outcome, Failed)
    assert eager.outcome.kind == "unsupported"
    assert "sees no CUDA GPU" in eager.outcome.message
    assert "--device cpu" in str(eager.outcome.hint)
    assert "fp16: unsupported: torch" in done.stdout
    assert "NVML peak MiB" in done.stdout  # the columns of a GPU, since a GPU was asked for
