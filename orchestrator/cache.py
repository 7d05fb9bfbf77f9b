"""Where qbench keeps what it fetched or prepared: the embedded model, converted weights, AWQ recipes, and
environments of their own."""

import os
import shutil
from pathlib import Path

from orchestrator.errors import BadInput

BYTES_PER_GB = 1_000_000_000


def cache_folder() -> Path:
    """$QBENCH_CACHE, else $XDG_CACHE_HOME/qbench, else ~/.cache/qbench; absolute, perhaps not there yet."""
    if chosen := os.environ.get("QBENCH_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "qbench"


def require_disk(folder: Path, needed_bytes: int) -> None:
    """Raise `BadInput` unless the disk that `folder` lies on, or will lie on, has `needed_bytes` free."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free_bytes = shutil.disk_usage(there).free
    if free_bytes < needed_bytes:
        raise BadInput(
            "folder",
            str(folder),
            f"needs {needed_bytes / BYTES_PER_GB:.1f} GB, but {free_bytes / BYTES_PER_GB:.1f} GB are free",
            "Free some, or set QBENCH_CACHE to a folder on a larger disk",
        )
