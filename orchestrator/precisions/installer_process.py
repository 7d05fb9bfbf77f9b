"""One run of pip or uv: its words on stderr as they come, and why it failed in one line."""

import os
import signal
import subprocess
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import click

from orchestrator.precisions.interpreter import untied_environment

GRACE_S = 3.0
"""How long an installer may take to end after it is asked to."""

COMPLAINTS = ("ERROR: ", "error: ", "cause: ", "× ", "╰─▶ ")
"""How pip and uv, new and old, begin a line that says what went wrong."""


class InstallerFailed(Exception):
    """The text is what it complained of last."""


def run_installer(command: list[str]) -> None:
    """Run an installer; what it says goes to stderr as it comes. Raises `InstallerFailed`."""
    said: deque[str] = deque(maxlen=200)
    with _started(command) as process:
        assert process.stderr is not None
        for line in process.stderr:
            click.echo(line, err=True, nl=False)
            said.append(line.strip())
    if process.returncode:
        raise InstallerFailed(_complaint(said) or f"{command[0]} ended with status {process.returncode}")


@contextmanager
def _started(command: list[str]) -> Iterator["subprocess.Popen[str]"]:
    """An installer in a session of its own, so that an interrupt here ends it with all that it started."""
    process = subprocess.Popen(
        command,
        env=untied_environment(),
        stdin=subprocess.DEVNULL,
        stdout=2,  # on a terminal pip draws its progress there
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    with process:
        try:
            yield process
        except BaseException:
            _end_group(process)
            raise


def _end_group(process: "subprocess.Popen[str]") -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)


def _complaint(said: Iterable[str]) -> str:
    """What of an installer's words tells why it failed: its last error, or whatever came last."""
    lines = [line for line in said if line and not line.startswith("ERROR: ResolutionImpossible")]
    errors = [line for line in lines if line.startswith(COMPLAINTS)]
    last = (errors or lines or [""])[-1]
    return next((last.removeprefix(each) for each in COMPLAINTS if last.startswith(each)), last)
