"""The cache folder: everything that qbench downloads or prepares.

The embedded model, converted and calibrated weights, virtual environments, and logs of internal errors.
"""

import os
import shutil
from pathlib import Path

from orchestrator.errors import BadInput

BYTES_PER_GB = 1_000_000_000


def cache_folder() -> Path:
    """$QBENCH_CACHE, else $XDG_CACHE_HOME/qbench, else ~/.cache/qbench; absolute, and may not exist yet."""
    if chosen := os.environ.get("QBENCH_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "qbench"


def require_disk(folder: Path, needed_bytes: int) -> None:
    """Raise `BadInput` unless the disk that `folder` is on, or would be on, has `needed_bytes` free."""
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise BadInput(
            "folder",
            str(folder),
            f"needs {needed_bytes / BYTES_PER_GB:.1f} GB, but {free_bytes / BYTES_PER_GB:.1f} GB are free",
            "Free some space, or set QBENCH_CACHE to a folder on a larger disk",
        )
