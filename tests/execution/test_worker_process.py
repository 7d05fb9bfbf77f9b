"""The parent turns any output of a worker into frames, and never leaves one of its processes running.

The workers here are small scripts, run as real processes that write to real pipes.
"""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from golden_text import Golden
from sample_records import make_job

from orchestrator.execution import worker_process
from orchestrator.execution.worker_process import WorkerProcess
from schemas.frames import AnyFrame, Done, Failed, Phase, Progress
from schemas.job import Job, Workload

PATIENCE_S = 120.0
"""No worker here needs longer, however busy the machine is."""

PRELUDE = """
import json, os, signal, subprocess, sys, time

def say(frame, **fields):
    sys.stdout.write(json.dumps({"frame": frame, **fields}) + "\\n")
    sys.stdout.flush()

def done():
    say("done", at_ns=1, trials_planned=0, trials_measured=0, sample_text=None)

job = json.loads(sys.stdin.readline())
"""

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
)
"""A grandchild that survives SIGTERM; it prints a line once it ignores the signal."""

START_STUBBORN = f"""
child = subprocess.Popen([sys.executable, "-I", "-S", "-c", {STUBBORN!r}], stdout=subprocess.PIPE)
child.stdout.readline()
say("progress", message=str(child.pid))
"""


def start(script: str, log: Path | None = None, job: Job | None = None) -> WorkerProcess:
    command = [sys.executable, "-I", "-S", "-c", PRELUDE + script]
    return WorkerProcess(command, dict(os.environ), job or make_job(), log)


def hear(script: str, log: Path | None = None, timeout_s: float = PATIENCE_S) -> list[AnyFrame]:
    with start(script, log) as worker:
        return [frame for frame in worker.frames(timeout_s) if frame is not None]


def failure_of(script: str) -> Failed:
    """The failure reported for a worker that sent neither Done nor Failed."""
    *_, last = hear(script)
    assert isinstance(last, Failed)
    return last


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # dead; its new parent will wait for it
    except psutil.NoSuchProcess:
        return True


def wait_until_gone(pid: int, seconds: float = PATIENCE_S) -> bool:
    deadline_s = time.monotonic() + seconds
    while not is_gone(pid) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return is_gone(pid)


def test_frames_arrive_decoded_up_to_done() -> None:
    frames = hear("""
say("progress", message=job["precision"] + " on " + job["device"], done=1, total=2)
done()
say("progress", message="not read")
""")
    assert frames == [
        Progress(message="fp16 on cuda:0", done=1, total=2),
        Done(at_ns=1, trials_planned=0, trials_measured=0, sample_text=None),
    ]


def test_a_workers_own_failure_is_passed_on() -> None:
    assert hear('say("failed", kind="unsupported", message="no", hint="yes")\nsys.exit(1)') == [
        Failed(kind="unsupported", message="no", hint="yes")
    ]


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"Loading weights: 100%", id="not JSON"),
        pytest.param(b"", id="blank line"),
        pytest.param(b"[]", id="not an object"),
        pytest.param(b'{"frame": "song"}', id="unknown frame"),
        pytest.param(b'{"frame": "progress"}', id="missing field"),
        pytest.param(b'{"frame": "progress", "message": "\xff"}', id="not UTF-8"),
    ],
)
def test_an_invalid_frame_is_a_crash(line: bytes, golden: Golden) -> None:
    failed = failure_of(f"sys.stdout.buffer.write({line!r} + bytes([10]))\nsys.stdout.flush()\ndone()")
    assert failed.kind == "crashed"
    golden(failed.message.partition(":")[0])  # followed by msgspec's message


def test_an_exit_without_a_result_reports_the_status(golden: Golden) -> None:
    golden([failure_of("sys.exit(3)").message, failure_of("").message])


def test_a_signal_is_reported_with_its_likely_cause(golden: Golden) -> None:
    killed = failure_of("os.kill(os.getpid(), signal.SIGKILL)")
    assert killed.kind == "crashed"
    assert killed.hint is not None
    crashed = failure_of("os.kill(os.getpid(), signal.SIGSEGV)")
    assert crashed.hint is None
    golden([killed.message, killed.hint, crashed.message])


def test_frames_before_a_crash_are_kept() -> None:
    first, last = hear('say("progress", message="so far")\nos.abort()')
    assert first == Progress(message="so far")
    assert isinstance(last, Failed)
    assert "SIGABRT" in last.message


def test_a_hang_ends_at_its_deadline_and_its_children_with_it(
    monkeypatch: pytest.MonkeyPatch, golden: Golden
) -> None:
    monkeypatch.setattr(worker_process, "GRACE_S", 0.3)
    with start(START_STUBBORN + "time.sleep(600)") as worker:
        frames = worker.frames(PATIENCE_S)
        grandchild = next(int(frame.message) for frame in frames if isinstance(frame, Progress))
        started_s = time.monotonic()
        *ticks, last = worker.frames(timeout_s=1, tick_s=0.25)
        assert time.monotonic() - started_s >= 1
        assert ticks == [None] * len(ticks)
        assert len(ticks) <= 4  # fewer on a busy machine, where ticks take longer
        assert not is_gone(grandchild)
    assert isinstance(last, Failed)
    assert last.kind == "timeout"
    golden([last.message, str(last.hint)])
    assert is_gone(worker.pid)
    assert wait_until_gone(grandchild)


def test_children_that_a_finished_worker_left_behind_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "GRACE_S", 0.3)
    progress, last = hear(START_STUBBORN + "done()")
    assert isinstance(progress, Progress)
    assert isinstance(last, Done)
    assert wait_until_gone(int(progress.message))


def test_after_an_interrupt_the_worker_gets_no_grace_period(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "GRACE_S", 300.0)
    started_s = 0.0
    with suppress(KeyboardInterrupt), start('say("progress", message="up")\ntime.sleep(600)') as worker:
        next(frame for frame in worker.frames(PATIENCE_S) if frame)
        started_s = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - started_s < worker_process.GRACE_S
    assert is_gone(worker.pid)


def test_a_worker_that_ignores_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "GRACE_S", 0.3)
    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    with start(stubborn + 'say("progress", message="up")\ntime.sleep(600)') as worker:
        next(frame for frame in worker.frames(PATIENCE_S) if frame)
    assert worker.process.returncode == -9


def test_a_worker_waits_at_a_phase_edge_until_it_is_acknowledged() -> None:
    with start('say("phase", name="start", at_ns=5)\nsys.stdin.readline()\ndone()') as worker:
        frames = worker.frames(PATIENCE_S, tick_s=0.1)
        assert next(frame for frame in frames if frame) == Phase(name="start", at_ns=5)
        assert [next(frames) for _ in range(3)] == [None] * 3
        worker.acknowledge()
        assert isinstance(next(frame for frame in frames if frame), Done)


def test_acknowledging_a_dead_worker_is_not_an_error() -> None:
    with start('say("phase", name="start", at_ns=5)') as worker:
        frames = list(worker.frames(PATIENCE_S))
        worker.acknowledge()
        worker.acknowledge()
    assert isinstance(frames[-1], Failed)


def test_a_frame_of_a_megabyte_in_pieces_is_one_frame() -> None:
    frames = hear("""
line = json.dumps({"frame": "progress", "message": "x" * 1_000_000}).encode() + b"\\n"
for begin in (0, 1, 300_000, 1_000_000):
    end = {0: 1, 1: 300_000, 300_000: 1_000_000, 1_000_000: len(line)}[begin]
    sys.stdout.buffer.write(line[begin:end])
    sys.stdout.flush()
    time.sleep(0.05)
done()
""")
    assert frames[0] == Progress(message="x" * 1_000_000)
    assert isinstance(frames[1], Done)


def test_many_frames_in_one_write_are_separated() -> None:
    frames = hear("""
lines = [json.dumps({"frame": "progress", "message": str(number)}) for number in range(10_000)]
sys.stdout.write("\\n".join(lines) + "\\n")
done()
""")
    assert [frame.message for frame in frames[:-1] if isinstance(frame, Progress)] == [
        str(number) for number in range(10_000)
    ]


def test_stderr_is_the_log(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    hear('print("a library prints", file=sys.stderr)\nos.write(2, b"and C too\\n")\ndone()', log)
    assert sorted(log.read_text().splitlines()) == ["a library prints", "and C too"]


def test_a_flood_on_stderr_blocks_nothing(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    assert isinstance(hear('os.write(2, b"x" * 5_000_000)\ndone()', log)[-1], Done)
    assert log.stat().st_size == 5_000_000


def test_without_a_log_stderr_is_the_parents(capfd: pytest.CaptureFixture[str]) -> None:
    hear('print("seen at once", file=sys.stderr)\ndone()')
    assert capfd.readouterr().err == "seen at once\n"


def test_a_worker_runs_in_a_new_process_session() -> None:
    with start('say("progress", message=str(os.getsid(0)))\ndone()') as worker:
        heard = next(frame for frame in worker.frames(PATIENCE_S) if frame)
        assert heard == Progress(message=str(worker.pid))
    assert worker.pid != os.getsid(0)


def test_a_job_longer_than_a_pipe_arrives_whole() -> None:
    prompts = ["word " * 2000] * 50
    job = make_job(workload=Workload(prompts=prompts))
    with start('say("progress", message=json.dumps(job["workload"]["prompts"]))\ndone()', job=job) as worker:
        heard = next(frame for frame in worker.frames(PATIENCE_S) if frame)
    assert isinstance(heard, Progress)
    assert json.loads(heard.message) == prompts


def test_a_long_job_that_is_not_read_does_not_delay_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "GRACE_S", 0.3)
    job = make_job(workload=Workload(prompts=["word " * 2000] * 50))
    command = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]
    started_s = time.monotonic()
    with WorkerProcess(command, dict(os.environ), job, None) as worker:
        *_, last = worker.frames(timeout_s=1)
    assert isinstance(last, Failed)
    assert last.kind == "timeout"
    assert time.monotonic() - started_s < 300  # before the worker would have exited


def test_a_crash_is_reported_while_a_child_still_holds_the_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "GRACE_S", 0.3)
    frames = hear("""
subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"])  # inherits stdout
os.kill(os.getpid(), signal.SIGKILL)
""")
    assert isinstance(frames[-1], Failed)
    assert frames[-1].kind == "crashed"  # not "timeout": it did not wait for the child
    assert "SIGKILL" in frames[-1].message
