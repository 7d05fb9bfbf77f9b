"""Interrupted runs are resumed: finished cells are kept, and the others are measured once.

Real processes and real signals. The workers, in a folder for `--workers`, imitate cells without torch, so
that only measuring the device's peaks needs time.
"""

import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path

import msgspec
import pytest
from commands import command, environment, run
from golden_text import Golden
from msgspec.structs import replace
from rich.console import Console
from sample_records import H100_PEAKS, make_cell, make_job, make_run

from orchestrator.errors import BadInput
from orchestrator.execution.progress import Watcher
from orchestrator.execution.resume import check_machine, left_of
from orchestrator.execution.run import run_plan
from orchestrator.planning.plan import Cell, Plan
from orchestrator.precisions.catalog import Precision
from orchestrator.precisions.interpreter import Interpreter
from orchestrator.records.keys import key_of
from orchestrator.records.store import RunFolder, read_run
from schemas.environment import Environment
from schemas.frames import AnyFrame, Done
from schemas.job import Workload
from schemas.options import Options
from schemas.record import MemoryReading, Run, RunPlan, Skipped

# A worker that finishes every cell immediately, except the one named by PLAY_HOLD, in which it waits forever.
WORKER = '''\
# /// script
# requires-python = ">=3.11"
# dependencies = []
# [tool.qbench]
# precision = "NAME"
# label = "NAME"
# bits_per_weight = 16
# devices = ["cpu"]
# ///
"""Imitates a worker."""

import json, os, sys, time

os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # when its parent is killed, its traceback interests no one

def say(frame, **fields):
    print(json.dumps({"frame": frame, **fields}), flush=True)

def enter(name):
    say("phase", name=name, at_ns=time.monotonic_ns())
    if not sys.stdin.readline():
        sys.exit()

line = sys.stdin.readline()
enter("start")
say("ready", pid=os.getpid(), at_ns=time.monotonic_ns(), python="PYTHON", versions={"msgspec": "MSGSPEC"},
    device="cpu", device_name="CPU")
while line.strip():
    job = json.loads(line)
    enter("setup")
    if os.environ.get("PLAY_HOLD") == f"{job['precision']} {job['workload']['depth']}":
        sys.exit(sys.stdin.read())
    steps = int(os.environ.get("PLAY_STEPS", "2"))
    say("trial", index=0, batch_size=1, prompt_tokens=8, new_tokens=3, prefill_s=0.1, decode_s=0.2,
        token_s=[0.1] * steps, enqueue_s=0.1, token_ids=[1, 2, 3])
    say("done", at_ns=time.monotonic_ns(), trials_planned=1, trials_measured=1, sample_text=None)
    say("waiting")
    line = sys.stdin.readline()
'''
NAMES = ("play-a", "play-b")
DEPTHS = (0, 8)
CELLS = [f"{name} {depth}" for name in NAMES for depth in DEPTHS]


@pytest.fixture(autouse=True, scope="module")
def same_commit() -> Iterator[None]:
    """A run isn't resumed with another commit, so editing or committing during the tests would break them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QBENCH_COMMIT", "0123456789ab")
        yield


def write_workers(folder: Path) -> Path:
    """Write the files of two precisions below `folder`, and return it."""
    (folder / "mine").mkdir(parents=True)
    for name in NAMES:
        text = WORKER.replace("NAME", name).replace("MSGSPEC", msgspec.__version__)
        text = text.replace("PYTHON", ".".join(map(str, sys.version_info[:3])))
        (folder / "mine" / f"{name.replace('-', '_')}.py").write_text(text)
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder for runs: two workers and a file of prompts."""
    (write_workers(tmp_path) / "prompts.txt").write_text("one\n")
    return tmp_path


def argv(*more: str | Path) -> list[str]:
    named = [text for name in NAMES for text in ("-p", name)]
    options = ["--workers", "mine", "--prompts", "prompts.txt", "-m", "random:qwen2.5-0.5b"]
    options += ["--depth", "0,8", "--device", "cpu", "--out", "run"]
    return command("orchestrate", *named, *options, *more)


@contextmanager
def started(
    cwd: Path, cache: Path, until: str, arguments: list[str] | None = None, **variables: str
) -> Iterator["subprocess.Popen[str]"]:
    """A run that has just printed a line with `until` in it; killed at the end if it is still running."""
    process = subprocess.Popen(
        arguments or argv(),
        cwd=cwd,
        env=environment(cache, TMPDIR=str(cwd), **variables),  # a killed parent leaves its links there
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # The shell may have set SIGINT to be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    try:
        assert any(until in line for line in process.stderr), f"{until!r} was not printed"
        yield process
    finally:
        process.kill()
        process.communicate()


def position(cell: str) -> str:
    """How lines about a cell begin."""
    precision, depth = cell.split()
    return f"[{CELLS.index(cell) + 1}/4] {precision} (depth {depth})"


def kill_in(cell: str, place: Path, cache: Path) -> Path:
    """The folder of a run that was killed while it measured this cell."""
    with started(place, cache, f"{position(cell)}: started", PLAY_HOLD=cell) as process:
        process.kill()
    return place / "run"


def resume(place: Path, cache: Path, *more: str | Path) -> subprocess.CompletedProcess[str]:
    return run(command("orchestrate", "--resume", "run", *more), place, environment(cache))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def measured_in(folder: Path) -> list[str]:
    """The cells of a run in the order of its records, all of them measured."""
    cells = read_run(folder).cells
    assert all(isinstance(cell.outcome, Done) for cell in cells)
    return [f"{cell.precision} {cell.job.workload.depth}" for cell in cells if cell.job]


# Killed


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_killed_at_every_cell_boundary(cell: str, place: Path, cache: Path) -> None:
    folder, finished = kill_in(cell, place, cache), CELLS.index(cell)
    before = contents(folder)
    assert len(before.get("records.jsonl", b"").splitlines()) == finished
    done = resume(place, cache)
    assert done.returncode == 0, done.stderr
    assert measured_in(folder) == CELLS
    after = contents(folder)
    assert after.pop("records.jsonl").startswith(before.pop("records.jsonl", b""))
    for name, content in before.items():  # including logs of workers that were killed
        assert after[name] == content, name
    lines = [line.split(":")[0] for line in done.stderr.splitlines()]
    assert lines == [position(cell) for cell in CELLS[finished:] for _ in "<>"]
    assert done.stdout.count("play-a") >= 2


@pytest.mark.slow
def test_killed_while_the_peaks_are_measured(place: Path, cache: Path) -> None:
    with started(place, cache, "measuring the device's peaks") as process:
        process.kill()
    (place / "run" / "peaks.json.draft").write_text('{"outcome"')  # as if killed while writing it
    assert set(contents(place / "run")) >= {"plan.json", "environment.json"}
    done = resume(place, cache)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("measuring the device's peaks\n")
    assert read_run(place / "run").peaks
    assert not list((place / "run").rglob("*.draft"))
    assert measured_in(place / "run") == CELLS


@pytest.mark.slow
def test_killed_in_the_middle_of_a_write(place: Path, cache: Path) -> None:
    """Linux kills a process that writes beyond a limit, here in the middle of the second record."""
    (place / "deadly").mkdir()
    (place / "deadly/sitecustomize.py").write_text(
        "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it by default\n"
    )
    path = os.pathsep.join([str(place / "deadly"), os.environ.get("PYTHONPATH", "")])
    limited = ["prlimit", "--core=0", "--fsize=300000", *argv()]
    done = run(limited, place, environment(cache, PYTHONPATH=path, PLAY_STEPS="50000", TMPDIR=str(place)))
    assert done.returncode == -signal.SIGXFSZ, done.stderr
    torn = (place / "run/records.jsonl").read_bytes()
    assert len(torn) == 300_000
    assert torn.count(b"\n") == 1
    assert measured_in(place / "run") == CELLS[:1]
    done = resume(place, cache)
    assert done.returncode == 0, done.stderr
    assert (place / "run/records.jsonl").read_bytes().startswith(torn[: torn.index(b"\n") + 1])
    assert measured_in(place / "run") == CELLS


# Interrupted


@pytest.mark.slow
def test_ctrl_c_prints_the_command_that_resumes(place: Path, cache: Path) -> None:
    with started(place, cache, "[2/4] play-a (depth 8): started", PLAY_HOLD="play-a 8") as process:
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=300)  # only a hang exceeds it, even on a busy machine
    assert process.returncode == 130
    last = printed.splitlines()[-1]
    assert last == "interrupted; to continue: qbench-orchestrate --resume run"
    script, *arguments = shlex.split(last.partition(": ")[2])
    done = run(command(script.removeprefix("qbench-"), *arguments), place, environment(cache))
    assert done.returncode == 0, done.stderr
    assert measured_in(place / "run") == CELLS


@pytest.mark.slow
def test_a_running_run_cannot_be_resumed(place: Path, cache: Path, golden: Golden) -> None:
    with started(place, cache, "[2/4] play-a (depth 8): started", PLAY_HOLD="play-a 8"):
        before = contents(place / "run")
        refused = resume(place, cache)
        assert contents(place / "run") == before
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: --resume {place / 'run'}: ")
    golden(refused.stderr.replace(str(place), "PLACE"))
    assert resume(place, cache).returncode == 0  # the lock ended with the process


# Resumed: every test gets a copy of one interrupted run


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The folder around a run that was killed in its second cell."""
    place = write_workers(tmp_path_factory.mktemp("resume") / "there")
    (place / "prompts.txt").write_text("one\n")
    kill_in("play-a 8", place, cache)
    return place


@pytest.fixture
def copied(cut_off: Path, tmp_path: Path) -> Path:
    shutil.copytree(cut_off, tmp_path / "there")
    change(tmp_path / "there/run/plan.json", str(cut_off), str(tmp_path / "there"))
    return tmp_path / "there"


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.slow
def test_a_run_is_resumed_from_any_directory_and_once_complete_is_only_shown(
    copied: Path, cache: Path, tmp_path: Path, golden: Golden
) -> None:
    argv = command("orchestrate", "--resume", copied / "run", "--timeout", "60", "--json")
    done = run(argv, tmp_path, environment(cache))
    assert done.returncode == 0, done.stderr
    assert measured_in(copied / "run") == CELLS
    before = contents(copied / "run")
    again = run([*argv[:-3], "--json"], tmp_path, environment(cache))
    assert (again.returncode, again.stdout) == (0, done.stdout)
    golden(again.stderr.replace(str(copied), "PLACE"))
    assert contents(copied / "run") == before


@pytest.mark.slow
def test_a_dry_run_lists_the_remaining_cells(copied: Path, cache: Path) -> None:
    before = contents(copied / "run")
    done = resume(copied, cache, "--dry-run")
    assert done.returncode == 0, done.stderr
    listed = [line.split(":")[0] for line in done.stdout.splitlines() if line.startswith("play")]
    assert listed == [cell.split()[0] for cell in CELLS[1:]]
    assert contents(copied / "run") == before


CHANGED: dict[str, tuple[str, str, str, list[str]]] = {
    "a prompt": ("prompts.txt", "one", "two", ["play-a: workload.prompts.0 ", "one", "two"]),
    "prompts": ("prompts.txt", "one\n", "one\ntwo\n", ["play-a: workload.prompts.1 ", "none", "two"]),
    "a second depth": ("run/plan.json", '"depth": 8', '"depth": 9', ["play-a: ", "; "]),
    "packages": ("mine/play_b.py", "[]", '["packaging"]', ["play-b: packages.0 ", "none", "packaging"]),
    "obstacle": ("mine/play_b.py", "[]", '["absent"]', ["play-b ", "absent"]),
    "platform": ("run/environment.json", '"platform": "', '"platform": "Plan 9 ', ["platform ", "Plan 9 "]),
    "driver": ("run/environment.json", '"driver": null', '"driver": "580"', ["driver ", "580", "none"]),
    "version": ("run/records.jsonl", msgspec.__version__, "0.1", ["msgspec ", "0.1", msgspec.__version__]),
    "folder": ("run/plan.json", '"cwd": "', '"cwd": "/gone', ["/gone"]),
}  # fmt: skip


STABLE = CHANGED.keys() - {"obstacle", "platform", "version"}
"""Changes of which the error is the same on every machine."""


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGED)
def test_a_change_is_refused_by_name(copied: Path, cache: Path, name: str, golden: Golden) -> None:
    file, old, new, facts = CHANGED[name]
    change(copied / file, old, new)
    before = contents(copied / "run")
    refused = resume(copied, cache)
    assert refused.returncode == 2, refused.stderr
    (line,) = refused.stderr.splitlines()
    assert line.startswith(f"error: --resume {copied / 'run'}: ")
    assert all(fact in line for fact in facts), line
    if name in STABLE:
        golden(line.replace(str(copied), "PLACE"))
    assert contents(copied / "run") == before


def test_other_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, golden: Golden) -> None:
    run = make_run(make_cell())
    for name in (
        "CUDA_VISIBLE_DEVICES",
        "CUDA_DEVICE_ORDER",
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
    ):
        monkeypatch.delenv(name, raising=False)
    renumbered = [replace(gpu, index=3) for gpu in run.environment.gpus]
    check_machine(Path("run"), run, replace(run.environment, gpus=renumbered))
    with pytest.raises(BadInput, match="GPU-1") as gone:
        check_machine(Path("run"), run, replace(run.environment, gpus=[]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(BadInput, match="CUDA_VISIBLE_DEVICES") as renamed:
        check_machine(Path("run"), run, run.environment)
    assert {(each.value.option, each.value.value) for each in (gone, renamed)} == {("--resume", "run")}
    golden([str(gone.value), str(renamed.value)])


@pytest.mark.slow
def test_a_slightly_different_memory_size_is_accepted(copied: Path, cache: Path) -> None:
    environment_ = copied / "run/environment.json"
    environment_.write_text(re.sub(r'("memory_bytes": )\d+', r"\g<1>5", environment_.read_text()))
    assert resume(copied, cache, "--dry-run").returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "facts"),
    [
        (["--new-tokens", "64"], ["--new-tokens 64: ", "128"]),
        (["-p", "play-a"], ["--precision play-a: ", "play-a, play-b"]),
        (["--rounds", "1", "--budget", "5"], ["--budget 5.0: ", "none"]),
    ],
)
def test_an_option_that_differs_is_refused(
    copied: Path, cache: Path, typed: list[str], facts: list[str], golden: Golden
) -> None:
    refused = resume(copied, cache, *typed)
    assert refused.returncode == 2
    assert all(fact in refused.stderr for fact in facts)
    golden(refused.stderr)


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path: Path, cache: Path) -> None:
    refused = resume(tmp_path, cache)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: RUN run: ")


# Read once


@pytest.fixture
def recording(tmp_path: Path) -> dict[str, str]:
    """Variables that make every Python process write down which `.jsonl` files it opens for reading."""
    (tmp_path / "recording").mkdir()
    (tmp_path / "recording/sitecustomize.py").write_text(RECORD_READS)
    path = os.pathsep.join([str(tmp_path / "recording"), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path, "READS": str(tmp_path / "reads")}


RECORD_READS = """\
import os, sys

def record(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".jsonl") and "r" in (arguments[1] or ""):
        os.write(log, os.path.basename(arguments[0]).encode() + b" ")

log = os.open(os.environ["READS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
sys.addaudithook(record)
"""


def reads(recording: dict[str, str]) -> Counter[str]:
    """How often `records.jsonl` was read, and how often samples of any cell."""
    names = Path(recording["READS"]).read_text().split()
    return Counter("records" if name == "records.jsonl" else "samples" for name in names)


@pytest.mark.slow
def test_an_estimate_reads_each_earlier_run_once_and_no_samples(
    copied: Path, cache: Path, recording: dict[str, str]
) -> None:
    for name in ("first", "second"):
        shutil.copytree(copied / "run", copied / "qbench-runs" / name)
        assert list((copied / "qbench-runs" / name / "samples").iterdir())
    done = run(argv("--dry-run"), copied, environment(cache, **recording))
    assert done.returncode == 0, done.stderr
    assert reads(recording) == {"records": 2}


@pytest.mark.slow
def test_a_resumed_run_is_read_at_the_start_and_for_its_summary(
    copied: Path, cache: Path, recording: dict[str, str]
) -> None:
    done = run(command("orchestrate", "--resume", "run"), copied, environment(cache, **recording))
    assert done.returncode == 0, done.stderr
    assert measured_in(copied / "run") == CELLS
    # At the start, for a torn last line once the folder is reserved, and for the summary.
    assert reads(recording) == {"records": 3, "samples": len(CELLS)}


# Budgets and rounds


def cells_of(place: Path, rounds: int, names: tuple[str, ...] = ("fp16", "play-b")) -> list[Cell]:
    """Cells of imitated precisions, FP16 among them."""

    def cell(name: str, round_: int) -> Cell:
        precision = Precision(
            name=name,
            module="user_workers.play_a",
            path=place / "mine/play_a.py",
            label=name,
            bits_per_weight=16,
            devices=["cpu"],
            requirements=[],
            summary="imitates a worker",
        )
        load = Workload(prompts=["one"])
        job = make_job(name, device="cpu", workload=load, round=round_)
        return Cell(precision, Interpreter(sys.executable, own=True), job, None)

    return [cell(name, round_) for round_ in range(rounds) for name in names]


class Interrupting(Watcher):
    """Simulates a Ctrl-C while this cell is measured, counted from 0 over all parts of the run."""

    def __init__(self, cell: int) -> None:
        super().__init__(Console(file=StringIO()), 9)
        self.cell = cell

    def see(self, frame: AnyFrame | None, reading: MemoryReading | None) -> None:
        if self.begun == self.cell + 1:
            signal.raise_signal(signal.SIGINT)


def plan_of(cells: list[Cell], budget_s: float | None = None, precise: float | None = None) -> Plan:
    return Plan(cells, budget_s, cooldown_s=0, timeout_s=60, explicit=True, precise=precise)


def begin_in(place: Path, plan: Plan) -> RunFolder:
    machine = Environment(
        qbench="0", commit=None, python="3", platform="", cpu="", cpu_count=1, memory_bytes=1, gpus=[]
    )
    recorded = RunPlan(command=[], options=Options(), jobs=[cell.job for cell in plan.cells], skipped={})
    folder = RunFolder.create(place / "run", recorded, machine)
    folder.write_peaks(H100_PEAKS)
    return folder


def continue_run(folder: RunFolder, plan: Plan, watcher: Watcher | None = None) -> Run:
    """Run the rest of a plan, until the watcher interrupts it."""
    begun = read_run(folder.path, samples=False)
    with suppress(KeyboardInterrupt):
        left = left_of(plan, begun.cells)
        run_plan(left, begun, folder, watcher or Watcher(Console(file=StringIO()), 9), None)
    return read_run(folder.path)


def test_samples_without_a_record_are_removed(place: Path) -> None:
    plan = plan_of(cells_of(place, 2))
    folder = begin_in(place, plan)
    continue_run(folder, plan, Interrupting(1))
    kept = contents(folder.path / "samples")
    (folder.path / "samples" / f"{key_of(plan.cells[3].job).stem}.jsonl").write_text('{"at_ns": 1, "proc')
    continue_run(folder, plan, Interrupting(0))
    assert contents(folder.path / "samples") == kept


def test_records_added_by_another_process_are_not_measured_again(place: Path, golden: Golden) -> None:
    """The other process held the folder until just before this one reserved it."""
    plan = plan_of(cells_of(place, 2))
    folder = begin_in(place, plan)
    begun = read_run(folder.path)
    continue_run(folder, plan, Interrupting(1))
    before = contents(folder.path)
    with pytest.raises(BadInput) as refused:
        run_plan(plan, begun, folder, Watcher(Console(file=StringIO()), 9), None)
    assert (refused.value.option, refused.value.value) == ("--resume", str(folder.path))
    golden(str(refused.value).replace(str(folder.path), "RUN"))
    assert contents(folder.path) == before


def test_the_remaining_budget_is_divided_among_the_remaining_cells(place: Path) -> None:
    plan = plan_of(cells_of(place, 2), budget_s=4000.0)
    folder = begin_in(place, plan)
    spent_s = sum(cell.wall_s or 0 for cell in continue_run(folder, plan, Interrupting(2)).cells)
    cells = continue_run(folder, plan).cells
    assert len(cells) == 4
    assert [cell.job.budget_s for cell in cells[:1] if cell.job] == [1000]
    assert cells[2].job
    assert cells[2].job.budget_s == pytest.approx((4000 - spent_s) / 2)


def test_a_spent_budget_stays_spent(place: Path) -> None:
    plan = plan_of(cells_of(place, 2), budget_s=1e-3)
    folder = begin_in(place, plan)
    folder.append(continue_run(begin_in(place / "other", plan), plan).cells[0])  # it overspent
    left_out = [cell.outcome for cell in continue_run(folder, plan).cells[1:]]
    assert left_out == [Skipped(reason="the budget of 0.001 s is spent")] * 3
    assert not list((folder.path / "logs").iterdir())


@pytest.mark.parametrize(("cell", "rounds"), [(3, 5), (11, 6)])
def test_precise_finishes_its_round_and_stops_as_without_an_interrupt(
    place: Path, cell: int, rounds: int
) -> None:
    """Both speeds are the same in every round, so five are enough; without `precise` they are not."""
    plan = plan_of(cells_of(place, 8), precise=0.01)
    folder = begin_in(place, plan)
    before = continue_run(folder, plan._replace(precise=None), Interrupting(cell)).cells
    assert len(before) == cell
    assert len(left_of(plan, before).cells) == 16 - cell
    after = continue_run(folder, plan).cells
    assert after[:cell] == before
    assert [each.job.round for each in after if each.job] == [at // 2 for at in range(2 * rounds)]


def test_rounds_of_a_precise_run_do_not_read_the_folder_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(cells_of(place, 8), precise=0.01)
    folder = begin_in(place, plan)
    begun = read_run(folder.path)
    opened: list[str] = []
    open_ = io.open

    def recorded(file: object, mode: str = "r", *more: object, **named: object) -> object:
        opened.append(f"{Path(str(file)).name} {mode}")
        return open_(file, mode, *more, **named)  # type: ignore[call-overload]

    monkeypatch.setattr(io, "open", recorded)
    run_plan(plan, begun, folder, Watcher(Console(file=StringIO()), 16), None)
    monkeypatch.undo()
    assert len(read_run(folder.path).cells) == 10
    assert {name for name in opened if name.startswith("records.jsonl")} == {"records.jsonl ab"}
    assert opened.count("records.jsonl ab") == 10
