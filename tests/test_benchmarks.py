"""The scripts in `benchmarks/` run with today's code. Their figures are not asserted."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

BENCHMARKS = ROOT / "benchmarks"
WITHOUT_A_GPU = sorted(file.stem for file in BENCHMARKS.glob("*.py") if file.stem != "cudnn_attention")


def python(*arguments: str | Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_scripts_can_import_everything() -> None:
    assert {"bench_gpu", "parent_speed", "sampler_cost"} <= set(WITHOUT_A_GPU)
    python("-c", f"import {', '.join(WITHOUT_A_GPU)}")


def test_figures_of_modes_are_printed_from_records() -> None:
    lines = python("bench_gpu.py", ROOT / "results/h100-modes", "--print").splitlines()
    assert len(lines) == 10
    assert "MBU 84%" in next(line for line in lines if line.startswith("7b compile"))


def test_the_cost_of_sampling_is_computed_from_records() -> None:
    assert python("sampler_cost.py", ROOT / "results/h100-sampler-shallow", "--print").startswith("156 ")


@pytest.mark.slow
def test_the_parents_speed_is_printed() -> None:
    lines = python("parent_speed.py", "500").splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        "500 cells, one round",
        "500 cells, 25 rounds",
        "200 runs of 4 cells",
    ]
