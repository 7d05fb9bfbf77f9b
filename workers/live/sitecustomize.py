"""Run by Python at the start of a program that `qbench-memory --live` watches.

It only adds a thread that wakes every tenth of a second and, once the program has imported torch and used
CUDA, writes how much memory torch's allocator holds.
"""

import importlib.machinery
import importlib.util
import json
import os
import sys
import threading
import time
from pathlib import Path

PERIOD_S = 0.1


def report(path: str) -> None:
    """Write lines of JSON to the pipe at `path` for as long as someone reads it."""
    pipe = os.open(path, os.O_WRONLY)
    while True:
        torch = sys.modules.get("torch")
        cuda = getattr(torch, "cuda", None)
        if cuda is not None and getattr(cuda, "is_initialized", bool)():
            try:
                os.write(pipe, line(cuda))
            except OSError:
                return
        time.sleep(PERIOD_S)


def line(cuda: object) -> bytes:
    """The allocator's totals over all devices; short enough for an atomic write to a pipe."""
    totals = dict.fromkeys(("allocated", "reserved"), 0)
    for device in range(cuda.device_count()):
        stats = cuda.memory_stats(device)
        for name in totals:
            totals[name] += stats.get(f"{name}_bytes.all.current", 0)
    facts = {"pid": os.getpid(), "at_ns": time.monotonic_ns()}
    facts |= {f"{name}_bytes": total for name, total in totals.items()}
    return json.dumps(facts).encode() + b"\n"


def run_shadowed_sitecustomize() -> None:
    """Python runs only one `sitecustomize`; run the environment's own too, if it has one."""
    here = Path(__file__).resolve().parent
    other_folders = [path for path in sys.path if Path(path or ".").resolve() != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", other_folders)
    if spec and spec.loader:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if "QBENCH_LIVE_PIPE" in os.environ:
    threading.Thread(
        target=report, args=(os.environ["QBENCH_LIVE_PIPE"],), name="qbench-live", daemon=True
    ).start()
run_shadowed_sitecustomize()
