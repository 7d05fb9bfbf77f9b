"""The tested range of torch: every header has it, and a later torch loses only the compile rows."""

import re
from pathlib import Path

import pytest
from golden_text import Golden
from packaging.requirements import Requirement
from packaging.version import Version
from worker_runs import copy_packages, cpu_job, run_jobs

from orchestrator.precisions.availability import why_not
from orchestrator.precisions.catalog import Precision, find_precisions
from schemas.frames import Done, Failed
from workers.generation.modes import TESTED_TORCH

PRECISIONS = find_precisions()
LATER = "2.14.1"


def torch_need(precision: Precision) -> Requirement:
    return next(need for need in map(Requirement, precision.requirements) if need.name == "torch")


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_header_allows_the_tested_versions_and_no_later_minor(name: str) -> None:
    need = torch_need(PRECISIONS[name])
    tested = re.findall(r"[\d.]+\d", TESTED_TORCH)
    assert all(need.specifier.contains(version) for version in tested)
    newest = max(map(Version, tested))
    assert not need.specifier.contains(f"{newest.major}.{newest.minor + 1}.0")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_later_torch_is_reported_with_the_command_that_replaces_it(device: str) -> None:
    precision = PRECISIONS["int8-wo"]
    installed = {Requirement(need).name: "0.18.0" for need in precision.requirements}
    installed |= {"torch": LATER, "transformers": "5.24.0", "accelerate": "1.15.0", "msgspec": "0.20.0"}
    capability = (9, 0) if device == "cuda" else None
    reason = why_not(precision, device, capability, installed, make_env="qbench-worker --make-env int8-wo")
    assert reason
    assert f"torch is {LATER}" in reason
    assert "'torch<2.14,>=2.11'" in reason


HIDE = """
    loaded = load_transformers_model(job, torch.float32)
    import sys
    import torch._inductor.PART
    sys.modules["torch._inductor.PART"] = None  # what an import of it now raises is what a rename raises
    torch.__version__ = "2.14.1"
    return loaded
"""


@pytest.mark.slow
@pytest.mark.parametrize("part", ["compile_fx", "decomposition"])
def test_a_renamed_part_of_torch_fails_the_compile_rows_only(
    part: str, tiny_llama: Path, cache: Path, tmp_path: Path, golden: Golden
) -> None:
    lent = copy_packages(tmp_path)
    worker = lent / "workers/fp32.py"
    worker.write_text(
        worker.read_text().replace(
            "\n    return load_transformers_model(job, torch.float32)\n", HIDE.replace("PART", part)
        )
    )
    jobs = [cpu_job("fp32", tiny_llama, cache, decode=mode) for mode in ("eager", "compile", "eager")]
    first, compiled, again = run_jobs(jobs, lent=lent)
    failed = compiled.one(Failed)
    assert failed.kind == "unsupported"
    assert f"torch._inductor.{part}" in failed.message
    assert TESTED_TORCH in failed.message
    assert first.one(Done).trials_measured == again.one(Done).trials_measured == 2
    golden([failed.message, failed.hint or ""])
