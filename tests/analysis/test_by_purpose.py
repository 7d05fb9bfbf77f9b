"""Memory by purpose: predictions match measurements."""

from pathlib import Path

import msgspec
import pytest
from analyses import by_purpose_of
from conftest import ROOT
from sample_records import MIB, edge, make_cell, make_job, make_loaded, make_trial, torch_memory
from worker_runs import cpu_job, run_jobs

from orchestrator.records.store import read_run
from schemas.frames import Done, ForwardCosts, Loaded, SetUp, Trial
from schemas.job import Workload
from schemas.record import CellRecord

COSTS = ForwardCosts(
    step_weight_bytes=100, kv_bytes_per_token=10, linear_parameters=1, head_parameters=1, attention_width=1
)


def gpu_cell(**fields: object) -> CellRecord:
    """100 MiB of weights after load, and a peak of 130 MiB in the only trial."""
    seen = [
        edge("load", 0, torch=torch_memory(0)),
        edge("setup", 1, torch=torch_memory(100 * MIB)),
        edge("warmup", 2, torch=torch_memory(100 * MIB)),
        edge("prefill", 3, torch=torch_memory(100 * MIB)),
        edge("end", 4, torch=torch_memory(101 * MIB, peak=130 * MIB)),
    ]
    job = make_job(workload=Workload(prompts=["one"], new_tokens=5, depth=7))
    trials = [make_trial(batch_size=2, kv_bytes=20 * MIB)]
    facts = {"edges": seen, "job": job, "trials": trials, "loaded": make_loaded(100 * MIB, costs=COSTS)}
    return make_cell(**(facts | fields))


def test_the_peak_is_weights_cache_and_activations() -> None:
    found = by_purpose_of(gpu_cell())
    assert found
    assert found.weights_predicted_bytes == found.weights_measured_bytes == 100 * MIB
    assert found.kv_measured_bytes == 20 * MIB
    assert found.activation_bytes == 10 * MIB


def test_a_growing_cache_holds_context_prompt_and_all_tokens_but_the_last() -> None:
    found = by_purpose_of(gpu_cell())
    assert found
    assert found.kv_predicted_bytes == 2 * (7 + 10 + 4) * 10


def test_a_static_cache_holds_its_capacity() -> None:
    found = by_purpose_of(gpu_cell(setup=SetUp(setup_s=1.0, cache_tokens=64)))
    assert found
    assert found.kv_predicted_bytes == 2 * 64 * 10


def test_unmeasured_memory_is_none() -> None:
    assert by_purpose_of(gpu_cell(loaded=None)) is None
    found = by_purpose_of(gpu_cell(trials=[make_trial()]))
    assert found
    assert (found.kv_measured_bytes, found.activation_bytes) == (None, None)
    unknown = by_purpose_of(gpu_cell(loaded=make_loaded(100 * MIB)))
    assert unknown
    assert unknown.kv_predicted_bytes is None


@pytest.mark.parametrize(
    "folder", ["tests/golden/h100-precisions-7b", "tests/golden/h100-modes/0.5b", "tests/golden/h100-smollm2"]
)
def test_loading_allocates_the_weights_and_nothing_else(folder: str) -> None:
    for cell in read_run(ROOT / folder).cells:
        found = by_purpose_of(cell)
        assert found
        assert found.weights_measured_bytes == pytest.approx(found.weights_predicted_bytes, rel=0.01)


@pytest.mark.parametrize("folder", ["tests/golden/h100-precisions-7b", "tests/golden/h100-precisions-0.5b"])
def test_on_an_h100_the_cache_is_as_large_as_predicted(folder: str) -> None:
    found = [by_purpose_of(cell) for cell in read_run(ROOT / folder).cells if cell.trials]
    assert len(found) >= 3
    for each in found:
        assert each
        assert each.kv_measured_bytes
        assert each.kv_measured_bytes == each.kv_predicted_bytes


@pytest.mark.slow
def test_the_cache_of_a_real_worker_is_as_large_as_predicted(lively: Path, cache: Path) -> None:
    prompts = ["Name a river.", "Why is the sky blue?"]
    shapes = [{"depth": 9}, {"batch_size": 2}, {"decode": "compile"}, {"decode": "generate"}]
    jobs = [cpu_job("fp32", lively, cache, prompts=prompts, **shape) for shape in shapes]
    runs = run_jobs(jobs)
    loaded = runs[0].one(Loaded)
    for job, run in zip(jobs, runs, strict=True):
        assert run.one(Done)
        cell = make_cell(job=job, loaded=loaded, setup=run.one(SetUp), trials=run.all(Trial))
        found = by_purpose_of(msgspec.structs.replace(cell, edges=[]))
        assert found
        if job.workload.decode == "generate":
            assert found.kv_measured_bytes is None
        else:
            assert found.kv_measured_bytes == found.kv_predicted_bytes
