"""What sampling memory costs the one who is sampled: eager decode with the sampler on and off, in turn.

    python results/sampler_cost.py FOLDER [MODEL]

One FP16 worker measures the same cell again and again; in every second one nobody looks at its memory. Eager
decode is what suffers first, since the host sets its pace. A host wanders, so each cell is held against its
neighbour, and the median over the pairs is the answer: it should stay under 0.5 %.
"""

import sys
from contextlib import ExitStack
from io import StringIO
from pathlib import Path
from statistics import median

from rich.console import Console

from orchestrator.cli import lay_out, open_nvml
from orchestrator.interpreter import lent_packages
from orchestrator.machine import describe_machine
from orchestrator.observation import Observation
from orchestrator.plan import Cell
from orchestrator.progress import Watcher
from orchestrator.run import Worker
from orchestrator.store import RunFolder
from orchestrator.vram import MemorySampler
from schemas.options import Options
from schemas.record import CellRecord, RunPlan

PAIRS = 5
PROMPTS = 3


def main(path: Path, model: str) -> None:
    """Measure, keep the records in `path`, and print a line per pair."""
    path.mkdir(parents=True, exist_ok=True)
    prompts = path / "prompts.txt"
    prompts.write_text("one\n" * PROMPTS)
    options = Options(precision=["fp16"], model=model, decode=["eager"], prompts=str(prompts), new_tokens=64)
    with ExitStack() as stack:
        nvml, reason = open_nvml(stack)
        (cell,) = lay_out(options, nvml).cells
        plan = RunPlan(command=sys.argv, options=options, jobs=[cell.job], skipped={})
        folder = RunFolder.create(path, plan, describe_machine(nvml, reason))
        lent = stack.enter_context(lent_packages())
        quiet = Watcher(Console(file=StringIO()), 1 + 2 * PAIRS)
        worker = stack.enter_context(Worker(cell, lent, folder, quiet, nvml, 600))
        _measure(worker, cell, folder)  # the first has the cold start
        shifts = [_pair(worker, cell, folder, stack) for _ in range(PAIRS)]
    print(f"median of {PAIRS} pairs: {median(shifts):+.2%} a token with the sampler on")


def _pair(worker: Worker, cell: Cell, folder: RunFolder, stack: ExitStack) -> float:
    """By how much a token takes longer while memory is sampled."""
    sampled_s = _measure(worker, cell, folder)
    resume = _stop(worker.seen)
    plain_s = _measure(worker, cell, folder)
    worker.seen.sampler = stack.enter_context(resume)
    print(f"{sampled_s * 1e3:.3f} ms with, {plain_s * 1e3:.3f} ms without: {sampled_s / plain_s - 1:+.2%}")
    return sampled_s / plain_s - 1


def _stop(seen: Observation) -> MemorySampler:
    """End sampling, and give a sampler that would take it up again."""
    assert seen.sampler
    seen.sampler.__exit__(None, None, None)
    source, seen.sampler = seen.sampler.source, None
    return MemorySampler(source)


def _measure(worker: Worker, cell: Cell, folder: RunFolder) -> float:
    """Median seconds per token over all trials of one more cell."""
    record: CellRecord = worker.measure(cell)
    folder.append(record)
    return median(seconds for trial in record.trials for seconds in trial.token_s)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "random:qwen2.5-0.5b")
