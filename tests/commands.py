"""Run the commands as a user does: in a folder, with a cache, into a pipe or on a terminal."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

COLOR = r"\x1b\[[0-9;]*(3[0-9]|4[0-9]|9[0-7]|10[0-7])[0-9;]*m"
"""Escape codes for text and background colors, but not for bold."""


def command(script: str, *arguments: str | Path) -> list[str]:
    """The argv of a console script in the environment that runs the tests."""
    return [str(Path(sys.executable).with_name(f"qbench-{script}")), *map(str, arguments)]


def environment(cache: Path, **more: str) -> dict[str, str]:
    """A user's environment variables, without those that control colors."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    return inherited | {"QBENCH_CACHE": str(cache)} | more


def run(
    argv: list[str], cwd: Path, env: dict[str, str], timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout_s)


def run_on_terminal(
    argv: list[str], cwd: Path, env: dict[str, str], timeout_s: float = 120
) -> tuple[int, str]:
    """Exit status and everything printed, with stdin, stdout and stderr on a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        argv, cwd=cwd, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    shown, deadline_s = b"", time.monotonic() + timeout_s
    try:
        while time.monotonic() < deadline_s:
            if not select.select([ours], [], [], 0.5)[0]:
                continue
            try:
                chunk = os.read(ours, 65_536)
            except OSError:  # Linux: the other end was closed
                break
            if not chunk:
                break
            shown += chunk
        return process.wait(max(0.1, deadline_s - time.monotonic())), shown.decode()
    finally:
        os.close(ours)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
