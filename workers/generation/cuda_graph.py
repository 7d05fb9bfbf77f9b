"""A decode step as one CUDA graph: every kernel of it in a single launch, without the host in between."""

import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from workers.protocol.errors import Unsupported

STEPS_BEFORE_CAPTURE = 2
"""Steps in which libraries allocate workspaces and Triton compiles, which a capture doesn't allow."""


def record_graph(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record `step`, and return what replays it. Raises `Unsupported` if it can't be recorded."""
    for _ in range(STEPS_BEFORE_CAPTURE):
        step()
    refuse_waiting(step)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        raise Unsupported(
            f"a decode step of this precision can't be recorded as a CUDA graph: {first_line(error)}",
            "use --decode eager",
        ) from error
    return graph.replay


def refuse_waiting(step: Callable[[], None]) -> None:
    """Run `step` once, and raise `Unsupported` if it waits for the GPU, which would break a capture.

    A broken capture leaves the CUDA context in an undefined state; a refused synchronization has no effect.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        raise Unsupported(
            f"every decode step waits for the GPU, at {origin(error)}, which no CUDA graph can record",
            "use --decode eager",
        ) from error
    finally:
        torch.cuda.set_sync_debug_mode("default")


def origin(error: BaseException) -> str:
    """Origin of `error`: the innermost line outside torch, e.g. `if x.any()` (ops.py:14)."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if "/torch/" not in frame.filename]
    frame = (outside or list(frames))[-1]
    return f"`{frame.line}` ({'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno})"


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
