"""A worker is listened to whatever it says, and nothing of it is left whatever it does.

The workers here are small scripts, run as real processes that speak through real pipes.
"""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from sample_records import make_job

from orchestrator.execution import worker_process
from orchestrator.execution.worker_process import WorkerProcess
from schemas.frames import AnyFrame, Done, Failed, Phase, Progress
from schemas.job import Job, Workload

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
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
)
"""A grandchild that a SIGTERM does not end; it prints once it is deaf to it."""

START_STUBBORN = f"""
child = subprocess.Popen([sys.executable, "-I", "-S", "-c", {STUBBORN!r}], stdout=subprocess.PIPE)
child.stdout.readline()
say("progress", message=str(child.pid))
"""


def start(script: str, log: Path | None = None, job: Job | None = None) -> WorkerProcess:
    command = [sys.executable, "-I", "-S", "-c", PRELUDE + script]
    return WorkerProcess(command, dict(os.environ), job or make_job(), log)


def hear(script: str, log: Path | None = None, timeout_s: float = 20) -> list[AnyFrame]:
    with start(script, log) as worker:
        return [frame for frame in worker.frames(timeout_s) if frame is not None]


def last_word(script: str) -> Failed:
    """What the parent makes of a worker that never said Done or Failed."""
    *_, last = hear(script)
    assert isinstance(last, Failed)
    return last


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # dead; whoever inherited it will wait
    except psutil.NoSuchProcess:
        return True


def wait_until_gone(pid: int, seconds: float = 5) -> bool:
    deadline_s = time.monotonic() + seconds
    while not is_gone(pid) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return is_gone(pid)


def test_frames_arrive_decoded_and_done_is_the_last() -> None:
    frames = hear("""
say("progress", message=job["precision"] + " on " + job["device"], done=1, total=2)
done()
say("progress", message="never heard")
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
        pytest.param(b"Loading weights: 100%", id="no JSON"),
        pytest.param(b"", id="a blank line"),
        pytest.param(b"[]", id="no object"),
        pytest.param(b'{"frame": "song"}', id="no frame of ours"),
        pytest.param(b'{"frame": "progress"}', id="a field is missing"),
        pytest.param(b'{"frame": "progress", "message": "\xff"}', id="no UTF-8"),
    ],
)
def test_a_line_that_is_no_frame(line: bytes) -> None:
    failed = last_word(f"sys.stdout.buffer.write({line!r} + bytes([10]))\nsys.stdout.flush()\ndone()")
    assert failed.kind == "crashed"
    assert "a line that is no frame" in failed.message


def test_an_end_without_a_word_tells_the_status() -> None:
    assert last_word("sys.exit(3)").message == "the worker ended with status 3 and no word"
    assert last_word("").message == "the worker ended with status 0 and no word"


def test_a_kill_is_named_with_its_likely_cause() -> None:
    killed = last_word("os.kill(os.getpid(), signal.SIGKILL)")
    assert (killed.kind, killed.message) == ("crashed", "the worker was killed by SIGKILL")
    assert "memory" in str(killed.hint)
    crashed = last_word("os.kill(os.getpid(), signal.SIGSEGV)")
    assert (crashed.message, crashed.hint) == ("the worker was killed by SIGSEGV", None)


def test_frames_before_a_crash_are_kept() -> None:
    first, last = hear('say("progress", message="so far")\nos.abort()')
    assert first == Progress(message="so far")
    assert isinstance(last, Failed)
    assert "SIGABRT" in last.message


def test_a_hang_is_ended_at_its_deadline_with_all_that_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "GRACE_S", 0.3)
    with start(START_STUBBORN + "time.sleep(60)") as worker:
        frames = worker.frames(timeout_s=30)
        grandchild = next(int(frame.message) for frame in frames if isinstance(frame, Progress))
        started_s = time.monotonic()
        *_, last = worker.frames(timeout_s=1)
        assert 1 <= time.monotonic() - started_s < 2.5  # a tick late at most, and some for a busy machine
        assert not is_gone(grandchild)
    assert isinstance(last, Failed)
    assert (last.kind, last.message) == ("timeout", "no result within 1 s")
    assert "--timeout" in str(last.hint)
    assert is_gone(worker.pid)
    assert wait_until_gone(grandchild)


def test_what_a_finished_worker_left_behind_is_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "GRACE_S", 0.3)
    progress, last = hear(START_STUBBORN + "done()")
    assert isinstance(progress, Progress)
    assert isinstance(last, Done)
    assert wait_until_gone(int(progress.message))


def test_an_interrupt_gives_no_moment_to_unload() -> None:
    started_s = 0.0
    with suppress(KeyboardInterrupt), start('say("progress", message="up")\ntime.sleep(60)') as worker:
        next(frame for frame in worker.frames(20) if frame)
        started_s = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - started_s < worker_process.GRACE_S
    assert is_gone(worker.pid)


def test_a_worker_deaf_to_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "GRACE_S", 0.3)
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    with start(deaf + 'say("progress", message="up")\ntime.sleep(60)') as worker:
        next(frame for frame in worker.frames(20) if frame)
    assert worker.process.returncode == -9


def test_a_worker_waits_at_a_phase_edge_until_it_is_acknowledged() -> None:
    with start('say("phase", name="start", at_ns=5)\nsys.stdin.readline()\ndone()') as worker:
        frames = worker.frames(20, tick_s=0.1)
        assert next(frame for frame in frames if frame) == Phase(name="start", at_ns=5)
        assert [next(frames) for _ in range(3)] == [None] * 3
        worker.acknowledge()
        assert isinstance(next(frame for frame in frames if frame), Done)


def test_an_acknowledgement_to_a_dead_worker_is_no_error() -> None:
    with start('say("phase", name="start", at_ns=5)') as worker:
        frames = list(worker.frames(20))
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


def test_many_frames_at_once_are_told_apart() -> None:
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
    hear('print("a library talks", file=sys.stderr)\nos.write(2, b"and C too\\n")\ndone()', log)
    assert sorted(log.read_text().splitlines()) == ["a library talks", "and C too"]


def test_a_flood_on_stderr_blocks_nobody(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    assert isinstance(hear('os.write(2, b"x" * 5_000_000)\ndone()', log)[-1], Done)
    assert log.stat().st_size == 5_000_000


def test_without_a_log_stderr_is_the_parents(capfd: pytest.CaptureFixture[str]) -> None:
    hear('print("seen at once", file=sys.stderr)\ndone()')
    assert capfd.readouterr().err == "seen at once\n"


def test_a_worker_has_a_session_of_its_own() -> None:
    with start('say("progress", message=str(os.getsid(0)))\ndone()') as worker:
        told = next(frame for frame in worker.frames(20) if frame)
        assert told == Progress(message=str(worker.pid))
    assert worker.pid != os.getsid(0)


def test_a_job_longer_than_a_pipe_arrives_whole() -> None:
    prompts = ["word " * 2000] * 50
    job = make_job(workload=Workload(prompts=prompts))
    with start('say("progress", message=json.dumps(job["workload"]["prompts"]))\ndone()', job=job) as worker:
        told = next(frame for frame in worker.frames(20) if frame)
    assert isinstance(told, Progress)
    assert json.loads(told.message) == prompts


def test_a_long_job_that_nobody_reads_holds_no_deadline_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "GRACE_S", 0.3)
    job = make_job(workload=Workload(prompts=["word " * 2000] * 50))
    command = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"]
    started_s = time.monotonic()
    with WorkerProcess(command, dict(os.environ), job, None) as worker:
        *_, last = worker.frames(timeout_s=1)
    assert isinstance(last, Failed)
    assert last.kind == "timeout"
    assert time.monotonic() - started_s < 10


def test_a_death_is_told_though_a_child_still_holds_the_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "GRACE_S", 0.3)
    started_s = time.monotonic()
    frames = hear(
        """
subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"])  # inherits stdout
os.kill(os.getpid(), signal.SIGKILL)
""",
        timeout_s=3,
    )
    assert isinstance(frames[-1], Failed)
    assert frames[-1].message == "the worker was killed by SIGKILL"
    assert time.monotonic() - started_s < 3
