"""On a real GPU: the three methods of the seed benchmark, and NVML beside torch.

Left out without a GPU; run with `pytest -m gpu`.
"""

import subprocess
import sys

import pytest
from conftest import ROOT

from orchestrator.memory import phase_memory, summarize_memory
from orchestrator.metrics import summarize
from orchestrator.store import read_run
from schemas.frames import Done
from schemas.record import CellRecord, Run

pytestmark = pytest.mark.gpu

PRECISIONS = ("fp16", "int8", "int8-t0", "awq")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A short run of random weights in the shapes of Qwen2.5-0.5B."""
    folder = tmp_path_factory.mktemp("gpu")
    prompts = folder / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    named = [argument for name in PRECISIONS for argument in ("-p", name)]
    command = [sys.executable, "-m", "orchestrator", *named, "--model", "random:qwen2.5-0.5b"]
    options = ["--new-tokens", "16", "--prompts", str(prompts), "--out", str(folder / "run")]
    subprocess.run([*command, *options], cwd=ROOT, check=True, timeout=300)
    return read_run(folder / "run")


def test_all_methods_of_the_seed_run(run: Run) -> None:
    assert [cell.precision for cell in run.cells] == list(PRECISIONS)
    for cell in run.cells:
        assert isinstance(cell.outcome, Done), cell.outcome
        assert [trial.new_tokens for trial in cell.trials] == [16, 16]


def test_the_worker_says_which_gpu_it_took(run: Run) -> None:
    uuids = {gpu.uuid for gpu in run.environment.gpus}
    assert all(cell.ready and cell.ready.device_uuid in uuids for cell in run.cells)


def test_allocated_after_load_is_the_weights(run: Run) -> None:
    for cell in run.cells:
        assert cell.loaded is not None
        weight_bytes = sum(cell.loaded.weight_bytes.values())
        assert summarize_memory(cell).loaded_bytes == pytest.approx(weight_bytes, rel=0.01)


def test_nvml_holds_more_than_torch_reserved(run: Run) -> None:
    for cell in run.cells:
        after_load = [phase for phase in phase_memory(cell) if phase.reserved_bytes]
        assert after_load
        for phase in after_load:
            assert phase.outside_torch_bytes is not None, cell.precision
            assert 100 * 2**20 < phase.outside_torch_bytes < 2 * 2**30


def test_savings_are_those_of_the_formats(run: Run) -> None:
    saved = {row.precision: row.saved_versus_baseline for row in summarize(run.cells)}
    assert saved["int8"] == pytest.approx(0.36, abs=0.02)
    assert saved["int8-t0"] == saved["int8"]
    assert saved["awq"] == pytest.approx(0.54, abs=0.02)


def test_every_worker_starts_clean(run: Run) -> None:
    def context_bytes(cell: CellRecord) -> int | None:
        return next(phase.process_bytes for phase in phase_memory(cell) if phase.phase == "context")

    contexts = [context_bytes(cell) for cell in run.cells]
    assert None not in contexts
    assert max(contexts) - min(contexts) < 64 * 2**20  # type: ignore[type-var, operator]


def test_sampling_costs_under_a_hundredth_of_a_core(run: Run) -> None:
    for cell in run.cells:
        assert cell.sampler is not None
        assert cell.sampler.source == "nvml"
        assert cell.sampler.cpu_s < 0.01 * cell.sampler.wall_s


def test_a_run_leaves_nothing_on_the_gpu(run: Run) -> None:
    listed = subprocess.run(
        ["nvidia-smi", "--query-compute-apps=pid,name", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "workers" not in listed.stdout
