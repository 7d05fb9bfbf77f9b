"""A run on a simulated GPU: a fake NVML, and fake workers that claim to use its GPU.

Everything between is real: the parent's NVML session through pynvml, the worker processes and their pipes,
the sampler's thread, and the resulting records, tables and warnings.
"""

import os
import sys
from pathlib import Path

import pytest
from analyses import warnings_of
from commands import command, environment, run
from fake_nvml import GPU_UUID, FakeNvml
from fake_worker import FULL_RUN, run_fake_worker
from sample_records import MIB, make_run

from orchestrator.analysis.memory.phases import phase_memory
from orchestrator.analysis.metrics import measure_cell
from orchestrator.records.store import read_run
from schemas.frames import Done, Failed

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


def test_each_phase_edge_has_both_views_of_memory(fake_nvml: FakeNvml, tmp_path: Path) -> None:
    cell = run_fake_worker(fake_nvml, tmp_path, FULL_RUN)
    assert isinstance(cell.outcome, Done)
    assert cell.baseline_device_bytes == 1_000_000
    assert [edge.reading for edge in cell.edges[:2]] == [None, None]  # before Ready, the GPU is unknown
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
        assert edge.reading.at_ns > edge.phase.at_ns  # read while the worker was paused, not before


def test_figures_follow_from_edges_and_samples(fake_nvml: FakeNvml, tmp_path: Path) -> None:
    cell = run_fake_worker(fake_nvml, tmp_path, FULL_RUN)
    row = measure_cell(cell)
    assert (row.loaded_bytes, row.footprint_bytes) == (900 * MIB, 900 * MIB)
    assert (row.peak_bytes, row.nvml_peak_bytes) == (1020 * MIB, 1600 * MIB)
    phases = {phase.phase: phase for phase in phase_memory(cell)}
    assert phases["load"].outside_torch_bytes == 500 * MIB
    assert phases["load"].device_bytes == 1600 * MIB
    assert phases["load"].sampled_peak_bytes == 9000 * MIB  # seen only by samples, between two edges
    assert len(cell.samples) >= 4
    assert {sample.process_bytes for sample in cell.samples} == {None}
    assert cell.sampler is not None
    assert (cell.sampler.source, cell.sampler.samples) == ("nvml", len(cell.samples))
    assert warnings_of(make_run(cell)) == []


def test_a_launchers_worker_is_found_by_the_pid_it_reports(fake_nvml: FakeNvml, tmp_path: Path) -> None:
    launcher = tmp_path / "python"
    launcher.write_text(f'#!/bin/sh\n"{sys.executable}" "$@"\nexit $?\n')
    launcher.chmod(0o755)
    cell = run_fake_worker(fake_nvml, tmp_path, FULL_RUN, str(launcher))
    assert measure_cell(cell).nvml_peak_bytes == 1600 * MIB


def test_a_hidden_pid_gives_a_reason_and_a_warning(fake_nvml: FakeNvml, tmp_path: Path) -> None:
    hidden = FULL_RUN.replace("512 * MIB)", "None)").replace(", 8900 * MIB", "").replace(", 1500 * MIB", "")
    cell = run_fake_worker(fake_nvml, tmp_path, hidden.replace(", 1600 * MIB", ""))
    readings = [edge.reading for edge in cell.edges if edge.reading]
    assert len(readings) == 5
    for reading in readings:
        assert reading.process_bytes is None
        assert reading.device_bytes is not None
        assert "a container hides pids" in str(reading.reason)
    row = measure_cell(cell)
    assert row.nvml_peak_bytes is None
    assert row.decode_tok_s == pytest.approx(10)
    (line,) = warnings_of(make_run(cell))
    assert line.startswith("fp16: NVML process bytes are missing: NVML lists no process")


def test_a_gpu_lost_midway_gives_a_reason_and_the_cell_ends(fake_nvml: FakeNvml, tmp_path: Path) -> None:
    cell = run_fake_worker(fake_nvml, tmp_path, LOST_MIDWAY)
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
    assert any("the GPU is lost" in line for line in warnings_of(make_run(cell)))


def test_observations_before_a_kill_are_kept(fake_nvml: FakeNvml, tmp_path: Path) -> None:
    script = "show(600 * MIB, 512 * MIB)\nready()\nenter('load', 0, 0)\nos.kill(os.getpid(), 9)\n"
    cell = run_fake_worker(fake_nvml, tmp_path, script)
    assert isinstance(cell.outcome, Failed)
    assert "SIGKILL" in cell.outcome.message
    assert cell.ready is not None
    assert cell.baseline_device_bytes == 1_000_000
    assert cell.edges[-1].reading is not None
    assert cell.edges[-1].reading.process_bytes == 512 * MIB


def test_a_worker_killed_at_a_phase_edge_is_a_row(fake_nvml: FakeNvml, tmp_path: Path) -> None:
    """It exits before the parent can answer, so the acknowledgement has no reader."""
    script = "say('phase', name='load', at_ns=1)\nos.kill(os.getpid(), 9)\n"
    cell = run_fake_worker(fake_nvml, tmp_path, script)
    assert isinstance(cell.outcome, Failed)
    assert "SIGKILL" in cell.outcome.message


# With the command and a real CPU build of torch


@pytest.fixture
def gpu_environment(fake_nvml: FakeNvml, cache: Path) -> dict[str, str]:
    return environment(cache) | {
        name: value for name, value in fake_nvml.env().items() if os.environ.get(name) != value
    }


def test_auto_chooses_the_gpu(gpu_environment: dict[str, str], tmp_path: Path) -> None:
    argv = command("orchestrate", "-p", "fp16", "--model", "random:qwen2.5-0.5b", "--dry-run")
    done = run(argv, tmp_path, gpu_environment)
    assert "random-qwen2.5-0.5b on cuda:0" in done.stdout
    assert "budget" not in done.stdout  # only a CPU has a default


def test_a_missing_second_gpu_is_bad_input(gpu_environment: dict[str, str], tmp_path: Path) -> None:
    argv = command("orchestrate", "-p", "fp16", "--model", "random:qwen2.5-0.5b", "--device", "cuda:1")
    done = run(argv, tmp_path, gpu_environment)
    assert done.returncode == 2
    assert "--device cuda:1: no such device: only 1 GPU" in done.stderr


@pytest.mark.slow
def test_a_cpu_run_on_a_machine_with_a_gpu_lists_the_gpu(
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
    assert "NVML peak MiB" in done.stdout  # the columns of a GPU, since one was requested
