"""Several cells of one precision share one worker, for as long as it lives."""

import sys
from io import StringIO
from pathlib import Path

import msgspec
import pytest
from golden_text import Golden
from rich.console import Console
from sample_records import H100_PEAKS, make_job

from orchestrator.cli.orchestrate import exit_status
from orchestrator.execution.progress import Watcher
from orchestrator.execution.run import run_plan
from orchestrator.planning.plan import Cell, Plan
from orchestrator.precisions.catalog import Precision
from orchestrator.precisions.interpreter import Interpreter
from orchestrator.records.store import RunFolder, read_run
from schemas.environment import Environment
from schemas.frames import Done, Failed
from schemas.job import DecodeMode, Workload
from schemas.options import Options, Sweep
from schemas.record import CellRecord, Run, RunPlan

# Sends a worker's frames without torch, job by job; the decode mode selects the failure to simulate.
WORKER = """
import json, os, sys, time

def say(frame, **fields):
    print(json.dumps({"frame": frame, **fields}), flush=True)

def enter(name):
    say("phase", name=name, at_ns=time.monotonic_ns())
    sys.stdin.readline()

def ready():
    say("ready", pid=os.getpid(), at_ns=time.monotonic_ns(), python="3.12", versions={},
        device="cpu", device_name="CPU")

line = sys.stdin.readline()
enter("start")
if "unloadable" in line:
    say("failed", kind="bad-model", message="half a file")
    sys.exit(1)
ready()
while line.strip():
    decode = json.loads(line)["workload"]["decode"]
    enter("setup")
    if decode == "compile":
        os._exit(9)
    enter("warmup")
    if decode == "graph":
        say("failed", kind="unsupported", message="no graph here")
    else:
        say("trial", index=0, batch_size=1, prompt_tokens=8, new_tokens=3, prefill_s=0.1, decode_s=0.2,
            token_s=[0.1, 0.1], enqueue_s=0.1, token_ids=[1, 2, 3])
        say("done", at_ns=time.monotonic_ns(), trials_planned=1, trials_measured=1, sample_text=None)
    say("waiting")
    line = sys.stdin.readline()
"""

MODES: list[DecodeMode] = ["eager", "graph", "compile", "generate", "eager"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The folder of the runs, with the worker's file."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/play.py").write_text(WORKER)
    return tmp_path


def run(place: Path, modes: list[DecodeMode], prompt: str = "one", cooldown_s: float = 0) -> list[CellRecord]:
    precision = Precision(
        name="fp16",
        module="user_workers.play",
        path=place / "mine/play.py",
        label="FP16",
        bits_per_weight=16,
        devices=["cpu"],
        requirements=[],
        summary="plays a worker",
    )
    python = Interpreter(sys.executable, own=True)
    cells = [
        Cell(precision, python, make_job(device="cpu", workload=workload), None)
        for workload in (Workload(prompts=[prompt], decode=mode, depth=at) for at, mode in enumerate(modes))
    ]
    environment = Environment(
        qbench="0", commit=None, python="3", platform="", cpu="", cpu_count=1, memory_bytes=1, gpus=[]
    )
    recorded = RunPlan(command=[], options=Options(), jobs=[cell.job for cell in cells], skipped={})
    folder = RunFolder.create(place / "run", recorded, environment)
    begun = Run(plan=recorded, environment=environment, cells=[], peaks=H100_PEAKS)
    plan = Plan(cells, budget_s=None, cooldown_s=cooldown_s, timeout_s=60, explicit=True)
    run_plan(plan, begun, folder, Watcher(Console(file=StringIO()), len(cells)), None)
    return read_run(folder.path).cells


def test_one_worker_runs_all_cells_and_a_new_one_those_after_a_crash(place: Path, golden: Golden) -> None:
    records = run(place, MODES)
    assert [record.job.workload.decode for record in records if record.job] == MODES
    eager, graph, crashed, generate, again = records
    assert all(isinstance(record.outcome, Done) for record in (eager, generate, again))
    assert isinstance(graph.outcome, Failed)
    assert graph.outcome.message == "no graph here"
    assert isinstance(crashed.outcome, Failed)
    assert crashed.outcome.kind == "crashed"
    golden(crashed.outcome.message)
    pids = [record.ready.pid for record in records if record.ready]
    assert len(pids) == 5
    assert pids[0] == pids[1] == pids[2]
    assert pids[3] == pids[4] != pids[0]
    assert {record.log for record in records[:3]} == {"logs/fp16.log"}
    assert {record.log for record in records[3:]} == {"logs/fp16.2.log"}


def test_each_cell_records_the_edges_of_its_worker_start_and_its_own(place: Path) -> None:
    first, second = run(place, ["eager", "generate"])
    names = [edge.phase.name for edge in first.edges]
    assert names == ["start", "setup", "warmup"]
    assert [edge.phase.name for edge in second.edges] == ["start", "setup", "setup", "warmup"]
    assert second.edges[:2] == first.edges[:2]
    assert first.began_ns
    assert second.began_ns
    assert second.edges[2].phase.at_ns > second.began_ns > first.edges[-1].phase.at_ns


def test_a_failed_load_is_not_tried_again(place: Path) -> None:
    records = run(place, ["eager", "graph", "generate"], prompt="unloadable")
    assert [record.outcome for record in records] == [Failed(kind="bad-model", message="half a file")] * 3
    assert len(list((place / "run/logs").iterdir())) == 1
    assert [record.wall_s is None for record in records] == [False, True, True]


def test_every_cell_but_the_first_waits_for_the_cooldown(place: Path) -> None:
    first, second = run(place, ["eager", "generate"], cooldown_s=0.5)
    assert first.began_ns
    assert second.began_ns
    assert second.began_ns - first.edges[-1].phase.at_ns > 0.5e9


def test_only_requested_cells_can_fail_a_run(place: Path) -> None:
    run(place, ["eager", "graph"])
    measured = read_run(place / "run")
    assert exit_status(measured) == 0  # no decode mode was named, and not every precision can do each
    modes: list[DecodeMode] = ["eager", "graph"]
    for options in (Options(decode=modes), Options(workloads=[Sweep(depth=[1]), Sweep(decode=modes)])):
        asked = msgspec.structs.replace(measured.plan, options=options)
        assert exit_status(msgspec.structs.replace(measured, plan=asked)) == 1
    for kind in ("error", "crashed"):
        cell = msgspec.structs.replace(measured.cells[1], outcome=Failed(kind=kind, message="odd"))
        assert exit_status(msgspec.structs.replace(measured, cells=[cell])) == 1
