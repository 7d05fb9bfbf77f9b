"""Reports of internal errors: one line for the user, and a log file with the traceback."""

import platform
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import entry_points
from pathlib import Path

from orchestrator import __version__
from orchestrator.cache import cache_folder


def report_crash(error: Exception, debug: bool) -> str:
    """Write the traceback to a log file and return one line about it; return the traceback if `debug`.

    The traceback is also returned if no log file can be written.
    """
    log = None if debug else _write_log(error)
    if log is None:
        return _traceback(error)
    name = type(error).__name__
    what = " ".join(f"{name}: {error}".split()) if str(error) else name
    url = issues_url()
    where = f": {url}" if url else ""
    return f"internal error: {what}. The traceback is in {log}; please report it with that file{where}"


def issues_url() -> str | None:
    """The issue tracker named in the installed package's metadata; None in a checkout not installed."""
    for command in entry_points(group="console_scripts", name="qbench-orchestrate"):
        urls = command.dist.metadata.get_all("Project-URL", []) if command.dist else []
        for label, _, url in (entry.partition(", ") for entry in urls):
            if label == "Issues":
                return str(url)
    return None


def _write_log(error: Exception) -> Path | None:
    """The log file: in the cache folder, or in the temporary folder if that can't be written to."""
    for folder in (lambda: cache_folder() / "logs", lambda: Path(tempfile.gettempdir())):
        try:
            return _write_log_to(folder, error)
        except (OSError, RuntimeError):  # RuntimeError: `~` of a user without a home folder
            continue
    return None


def _write_log_to(find_folder: Callable[[], Path], error: Exception) -> Path:
    folder = find_folder()
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    with tempfile.NamedTemporaryFile(
        "w", prefix=f"qbench-{now}-", suffix=".log", dir=folder, delete=False, encoding="utf-8"
    ) as log:
        log.write(f"{_heading()}{_traceback(error)}\n")
    return Path(log.name)


def _heading() -> str:
    return (
        f"command: {shlex.join(sys.argv)}\n"
        f"qbench {__version__}, Python {platform.python_version()}, {platform.platform()}\n\n"
    )


def _traceback(error: Exception) -> str:
    return "".join(traceback.format_exception(error)).rstrip("\n")
