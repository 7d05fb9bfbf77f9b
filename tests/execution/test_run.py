"""Several cells of one precision: one worker for all of them, for as long as it lives."""

import sys
from collections import deque
from io import StringIO
from pathlib import Path

import msgspec
import pytest
from rich.console import Console
from sample_records import make_job

from orchestrator.cli.orchestrate import exit_status
from orchestrator.execution.budget import Budget, Pause
from orchestrator.execution.progress import Watcher
from orchestrator.execution.run import Worker, _run_queue
from orchestrator.planning.plan import Cell, Plan
from orchestrator.precisions.catalog import Precision
from orchestrator.precisions.interpreter import Interpreter
from orchestrator.records.store import RunFolder, read_run
from schemas.environment import Environment
from schemas.frames import Done, Failed
from schemas.job import DecodeMode, Workload
from schemas.options import Options, Sweep
from schemas.record import CellRecord, RunPlan

# Frames as a worker sends them, without torch: job by job, until something is played on it.
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
def lent(tmp_path: Path) -> Path:
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers/__init__.py").touch()
    (tmp_path / "workers/play.py").write_text(WORKER)
    return tmp_path


def run(lent: Path, modes: list[DecodeMode], prompt: str = "one", cooldown_s: float = 0) -> list[CellRecord]:
    precision = Precision(
        name="fp16",
        module="workers.play",
        path=lent / "workers/play.py",
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
    plan = RunPlan(command=[], options=Options(), jobs=[cell.job for cell in cells], skipped={})
    folder = RunFolder.create(lent / "run", plan, environment)
    watcher = Watcher(Console(file=StringIO()), len(cells))
    queue, budget, pause = deque(cells), Budget(None, len(cells)), Pause(cooldown_s)
    while queue:
        with Worker(queue[0], lent, folder, watcher, None, 30) as worker:
            _run_queue(queue, worker, Plan(cells, None, cooldown_s), budget, pause, True, [])
    return read_run(folder.path).cells


def test_one_worker_does_all_cells_and_a_fresh_one_those_after_a_crash(lent: Path) -> None:
    records = run(lent, MODES)
    assert [record.job.workload.decode for record in records if record.job] == MODES
    eager, graph, crashed, generate, again = records
    assert all(isinstance(record.outcome, Done) for record in (eager, generate, again))
    assert isinstance(graph.outcome, Failed)
    assert graph.outcome.message == "no graph here"
    assert isinstance(crashed.outcome, Failed)
    assert crashed.outcome.message == "the worker ended with status 9 and no word"
    pids = [record.ready.pid for record in records if record.ready]
    assert len(pids) == 5
    assert pids[0] == pids[1] == pids[2]
    assert pids[3] == pids[4] != pids[0]
    assert {record.log for record in records[:3]} == {"logs/fp16.log"}
    assert {record.log for record in records[3:]} == {"logs/fp16.2.log"}


def test_each_cell_has_the_edges_of_its_worker_and_its_own(lent: Path) -> None:
    first, second = run(lent, ["eager", "generate"])
    names = [edge.phase.name for edge in first.edges]
    assert names == ["start", "setup", "warmup"]
    assert [edge.phase.name for edge in second.edges] == ["start", "setup", "setup", "warmup"]
    assert second.edges[:2] == first.edges[:2]
    assert first.began_ns
    assert second.began_ns
    assert second.edges[2].phase.at_ns > second.began_ns > first.edges[-1].phase.at_ns


def test_what_cannot_be_loaded_is_not_loaded_again(lent: Path) -> None:
    records = run(lent, ["eager", "graph", "generate"], prompt="unloadable")
    assert [record.outcome for record in records] == [Failed(kind="bad-model", message="half a file")] * 3
    assert len(list((lent / "run/logs").iterdir())) == 1
    assert [record.wall_s is None for record in records] == [False, True, True]


def test_a_cooldown_lies_before_every_cell_but_the_first(lent: Path) -> None:
    first, second = run(lent, ["eager", "generate"], cooldown_s=0.5)
    assert first.began_ns
    assert second.began_ns
    assert second.began_ns - first.edges[-1].phase.at_ns > 0.5e9


def test_only_what_was_asked_for_can_fail_a_run(lent: Path) -> None:
    run(lent, ["eager", "graph"])
    measured = read_run(lent / "run")
    assert exit_status(measured) == 0  # no decode mode was named, and not every precision can do each
    modes: list[DecodeMode] = ["eager", "graph"]
    for options in (Options(decode=modes), Options(workloads=[Sweep(depth=[1]), Sweep(decode=modes)])):
        asked = msgspec.structs.replace(measured.plan, options=options)
        assert exit_status(msgspec.structs.replace(measured, plan=asked)) == 1
    for kind in ("error", "crashed"):
        cell = msgspec.structs.replace(measured.cells[1], outcome=Failed(kind=kind, message="odd"))
        assert exit_status(msgspec.structs.replace(measured, cells=[cell])) == 1
