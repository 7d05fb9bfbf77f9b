"""On a real GPU: the main precisions in two decode modes, and NVML compared with torch.

Skipped unless run with `pytest -m gpu`.
"""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from analyses import memory_of, rows_of
from conftest import ROOT
from worker_runs import cpu_job, run_jobs

from orchestrator.analysis.conditions import trial_conditions
from orchestrator.analysis.memory.phases import phase_memory
from orchestrator.records.keys import key_of
from orchestrator.records.store import read_run
from schemas.frames import Done, Failed, Profile, Trial
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


@pytest.fixture
def measured(run: Run) -> list[CellRecord]:
    return [cell for cell in run.cells if isinstance(cell.outcome, Done)]


def test_the_main_precisions_run_in_both_modes(run: Run) -> None:
    outcomes = {key_of(cell).name: cell.outcome for cell in run.cells}
    assert list(outcomes) == [name for each in PRECISIONS for name in (each, f"{each} graph")]
    refused = outcomes.pop("int8 graph")
    assert isinstance(refused, Failed)
    assert refused.kind == "unsupported"
    assert "waits for the GPU" in refused.message
    assert "bitsandbytes" in refused.message or "ops.py" in refused.message
    for outcome in outcomes.values():
        assert isinstance(outcome, Done), outcome


def test_a_graph_decouples_decode_from_the_host(run: Run) -> None:
    rows = {(row.precision, row.decode): row for row in rows_of(run)}
    for precision in ("fp16", "int8-t0", "awq"):
        eager, graph = rows[precision, "eager"], rows[precision, "graph"]
        assert (graph.decode_tok_s or 0) > 3 * (eager.decode_tok_s or 0)
        assert eager.decode_bound == "launch"
        assert graph.decode_bound != "launch"
        assert (graph.decode_busy_s or 0) == pytest.approx(eager.decode_busy_s, rel=0.3)
        assert 500 < (graph.kernels_per_token or 0) < 3000


def test_every_trial_records_its_conditions(measured: list[CellRecord]) -> None:
    for cell in measured:
        for trial in trial_conditions(cell):
            assert trial.sm_clock_mhz
            assert 200 < trial.sm_clock_mhz < 4000
            assert trial.temperature_c
            assert 10 < trial.temperature_c < 100
            assert trial.power_w
            assert 20 < trial.power_w < 1500


@pytest.mark.parametrize(("batch_size", "depth"), [(1, 0), (3, 0), (3, 300)])
def test_all_modes_give_the_same_tokens(batch_size: int, depth: int, lively: Path, cache: Path) -> None:
    modes = ["eager", "graph", "compile", *([] if depth else ["generate"])]
    prompts = ["Name a river.", "Why is the sky blue, and not green, when the sun is high?", "Go"]
    jobs = [
        cpu_job(
            "fp32",
            lively,
            cache,
            device="cuda:0",
            prompts=prompts,
            batch_size=batch_size,
            depth=depth,
            decode=mode,
        )
        for mode in modes
    ]
    runs = run_jobs(jobs)
    answers = [[trial.token_ids for trial in run.all(Trial)] for run in runs]
    assert all(each == answers[0] for each in answers)
    assert min(len(set(answer)) for answer in answers[0]) > 3
    profiles = [run.one(Profile).decode for run in runs]
    assert all(profile and profile.launches for profile in profiles)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_attention_over_a_long_cache_agrees_with_torch(dtype: str) -> None:
    import torch

    from workers.generation.static_cache import LONG_CACHE, grouped_attention

    torch.manual_seed(0)
    make = partial(torch.randn, device="cuda:0", dtype=getattr(torch, dtype))
    query, key, value = make(3, 28, 1, 128) * 4, make(3, 4, 512, 128), make(3, 4, 512, 128)
    assert key.shape[2] > LONG_CACHE
    mask = torch.zeros(3, 1, 1, 512, device="cuda:0", dtype=query.dtype)
    mask[0, ..., :70] = mask[..., 400:] = float("-inf")
    ours, _ = grouped_attention(torch.nn.Module(), query, key, value, mask)
    keys, values = (each.repeat_interleave(7, dim=1) for each in (key, value))
    torchs = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    tolerance = 0.02 if dtype == "bfloat16" else 0.004
    torch.testing.assert_close(ours, torchs.transpose(1, 2), rtol=0.02, atol=tolerance)


def test_the_worker_reports_its_gpu(run: Run) -> None:
    uuids = {gpu.uuid for gpu in run.environment.gpus}
    assert all(cell.ready and cell.ready.device_uuid in uuids for cell in run.cells)


def test_memory_allocated_after_load_equals_the_weights(measured: list[CellRecord]) -> None:
    for cell in measured:
        assert cell.loaded is not None
        weight_bytes = sum(cell.loaded.weight_bytes.values())
        assert memory_of(cell).loaded_bytes == pytest.approx(weight_bytes, rel=0.01)


def test_nvml_reports_more_than_torch_reserved(run: Run) -> None:
    for cell in run.cells:
        after_load = [phase for phase in phase_memory(cell) if phase.reserved_bytes]
        assert after_load
        for phase in after_load:
            assert phase.outside_torch_bytes is not None, cell.precision
            assert 100 * 2**20 < phase.outside_torch_bytes < 2 * 2**30


def test_savings_match_the_formats(run: Run) -> None:
    saved = {row.precision: row.saved_versus_baseline for row in rows_of(run) if not row.reason}
    assert saved["int8"] == pytest.approx(0.36, abs=0.02)
    assert saved["int8-t0"] == saved["int8"]
    assert saved["awq"] == pytest.approx(0.54, abs=0.02)


def test_every_worker_starts_with_the_same_memory(run: Run) -> None:
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
