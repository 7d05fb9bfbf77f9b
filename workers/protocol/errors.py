"""Failures of a worker, as reported to the parent."""

import traceback

from schemas.frames import Failed, FailureKind

OUT_OF_MEMORY = (
    "out of memory",
    "Cannot allocate memory",  # Linux, through torch's allocator on a CPU too
    "CUBLAS_STATUS_ALLOC_FAILED",
    "NVML_SUCCESS == r",  # torch's out-of-memory, if its NVML call for the message fails
)


class Unsupported(Exception):
    """This precision can't do what was asked, and that isn't a bug. `hint` suggests what to do instead."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


def describe_failure(error: Exception) -> Failed:
    """Turn an exception into a failed row: its kind, one line of message, and a hint."""
    kind, hint = _classify(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # torch.compile's first line says that something was raised, and the second what it was.
    message = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    return Failed(
        kind=kind,
        message=message[:300],
        hint=hint,
        traceback="".join(traceback.format_exception(error)),
    )


def _classify(error: Exception) -> tuple[FailureKind, str | None]:
    text = str(error)
    if isinstance(error, Unsupported):
        return "unsupported", error.hint
    if isinstance(error, ModuleNotFoundError):
        name = (error.name or "").split(".")[0]
        return "missing-package", f"pip install {name}" if name else None
    if isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY):
        return "out-of-memory", "use a smaller model, fewer tokens or a smaller batch"
    if "No space left on device" in text:
        return "error", "free some disk space, or set QBENCH_CACHE to a folder on a larger disk"
    if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
        return "bad-model", "check --model and --checkpoint; the log has the full message"
    return "error", None
