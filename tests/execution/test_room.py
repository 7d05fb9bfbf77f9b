"""A workload that runs out of memory is a failed row; any at least as large is skipped for that reason."""

from pathlib import Path
from typing import Any

import pytest
from commands import command, environment, run
from golden_text import Golden
from sample_records import make_cell, make_job

from orchestrator.cli.orchestrate import exit_status
from orchestrator.execution.out_of_memory import ran_out, why_no_room
from orchestrator.records.store import read_run
from schemas.frames import Done, Failed, Ready
from schemas.job import Job, Workload
from schemas.record import CellRecord, Skipped

NO_ROOM = Failed(kind="out-of-memory", message="CUDA out of memory")


def job(precision: str = "fp16", aa_control: bool = False, round_: int = 0, **load: Any) -> Job:
    workload = Workload(prompts=["one"], **({"batch_size": 16, "new_tokens": 8, "depth": 4} | load))
    return make_job(precision, workload=workload, aa_control=aa_control, round=round_)


@pytest.mark.parametrize(
    ("larger", "limit"),
    [
        (job(batch_size=32), "batch 16 "),
        (job(depth=5), "depth 4 "),
        (job(batch_size=32, new_tokens=9), "batch 16, 8 new tokens "),
        (job(round_=1), "in an earlier process "),
        (job(aa_control=True), "in an earlier process "),
    ],
)
def test_a_workload_at_least_as_large_does_not_fit(larger: Job, limit: str, golden: Golden) -> None:
    why = why_no_room(larger, [job("awq"), job()])
    assert why is not None
    assert why.startswith(limit)
    golden(why)


@pytest.mark.parametrize(
    "other",
    [
        job(batch_size=8),
        job(batch_size=32, new_tokens=7),
        job(batch_size=32, depth=3),
        job("int8", batch_size=32),
        job(batch_size=32, decode="graph"),
        job(batch_size=32, prompt_tokens=4096),  # may be longer or shorter than the natural prompts
    ],
)
def test_a_smaller_or_different_workload_may_fit(other: Job) -> None:
    assert why_no_room(other, [job()]) is None


def test_prompts_are_compared_by_length(golden: Golden) -> None:
    why = why_no_room(job(prompt_tokens=64), [job(prompt_tokens=32)])
    assert why is not None
    assert "32" in why
    golden(why)
    assert why_no_room(job(prompt_tokens=16), [job(prompt_tokens=32)]) is None
    assert why_no_room(job(), [job(prompt_tokens=32)]) is None


def test_a_workload_was_too_large_only_if_the_model_was_loaded() -> None:
    assert ran_out(make_cell(outcome=NO_ROOM))
    assert not ran_out(make_cell(outcome=NO_ROOM, loaded=None))
    assert not ran_out(make_cell(outcome=Failed(kind="crashed", message="killed")))
    assert not ran_out(make_cell())


# A real run

WORKER = '''\
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6"]
# [tool.qbench]
# precision = "tight"
# label = "Tight"
# bits_per_weight = 32
# devices = ["cpu"]
# ///
"""Tight: enough memory for four rows, but not for more."""

from schemas.job import Job
from workers.protocol.backend import Backend, LoadedModel
from workers.harness.main import main


def load(job: Job) -> LoadedModel:
    import torch

    from workers.generation.device import Device
    from workers.models.transformers_model import load_transformers_model

    def check(module, given, named):
        if named["input_ids"].shape[0] > 4:
            Device.is_usable = lambda self: STILL_USABLE
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    loaded = load_transformers_model(job, torch.float32)
    loaded.model.register_forward_pre_hook(check, with_kwargs=True)
    return loaded


if __name__ == "__main__":
    main(Backend(load))
'''


def outcomes(cells: list[CellRecord]) -> list[str]:
    """Batch size and outcome of each cell."""
    found = []
    for cell in cells:
        how = {Done: "done", Failed: "failed"}.get(type(cell.outcome))
        assert cell.job
        size = cell.job.workload.batch_size
        found.append(f"{size} {cell.outcome.reason if isinstance(cell.outcome, Skipped) else how}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("still_usable", [True, False])
def test_smaller_workloads_are_still_measured(
    still_usable: bool, tiny_llama: Path, tmp_path: Path, cache: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "tight.py").write_text(WORKER.replace("STILL_USABLE", str(still_usable)))
    options = ["--workers", "mine", "-p", "tight", "-m", str(tiny_llama), "--device", "cpu", "--out", "run"]
    options += ["--batch-size", "8,1,16,4", "--new-tokens", "2", "--warmup", "0", "--rounds", "2"]
    done = run(command("orchestrate", *options), tmp_path, environment(cache))
    assert done.returncode == 1, done.stdout + done.stderr
    measured = read_run(tmp_path / "run")
    first, second = measured.cells[:4], measured.cells[4:]
    skipped = "16 batch 8 ran out of memory"
    assert outcomes(first) == ["8 failed", "1 done", skipped, "4 done"]
    assert outcomes(second) == ["8 in an earlier process it ran out of memory", "1 done", skipped, "4 done"]
    failed = first[0].outcome
    assert isinstance(failed, Failed)
    assert failed.kind == "out-of-memory"
    pids = [cell.ready.pid for cell in measured.cells if isinstance(cell.ready, Ready)]
    assert len(pids) == 5
    assert (pids[0] == pids[1]) == still_usable
    assert pids[1] == pids[2] != pids[3] == pids[4]
    assert "• tight (batch 8): out-of-memory: CUDA out of memory. Tried to allocate 2 GiB" in done.stdout
    assert "• tight (batch 16): skipped, batch 8 ran out of memory" in done.stdout
    # Skipped cells alone are no failure.
    without = [cell for cell in measured.cells if not isinstance(cell.outcome, Failed)]
    measured.cells[:] = without
    assert exit_status(measured) == 0
