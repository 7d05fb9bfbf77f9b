"""A worker that a script controls cell by cell, for measurements that no command makes."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from orchestrator.cli.orchestrate import build_plan, open_nvml
from orchestrator.execution.cell_worker import CellWorker, RunContext
from orchestrator.execution.idle_gpu import IdleGpu
from orchestrator.execution.progress import Watcher
from orchestrator.hardware.machine import describe_machine
from orchestrator.planning.plan import Cell
from orchestrator.precisions.interpreter import lent_packages
from orchestrator.records.store import RunFolder
from schemas.job import DecodeMode
from schemas.options import Options
from schemas.record import CellRecord, RunPlan


class OneWorker(NamedTuple):
    """A worker, and the cells that it was planned for."""

    worker: CellWorker
    cells: list[Cell]
    folder: RunFolder

    def measure(self, cell: Cell) -> CellRecord:
        """Measure a cell and keep its record; a cell can be measured repeatedly."""
        record = self.worker.measure(cell)
        self.folder.append(record)
        return record


@contextmanager
def one_worker(
    path: Path, model: str, prompts: int, decode: list[DecodeMode], new_tokens: int
) -> Iterator[OneWorker]:
    """FP16 of `model`, its records in a run folder `path`."""
    path.mkdir(parents=True, exist_ok=True)
    file = path / "prompts.txt"
    file.write_text("one\n" * prompts)
    options = Options(
        precision=["fp16"], model=model, decode=decode, prompts=str(file), new_tokens=new_tokens
    )
    with ExitStack() as stack:
        nvml, reason = open_nvml(stack)
        cells = build_plan(options, nvml).cells
        plan = RunPlan(command=sys.argv, options=options, jobs=[cell.job for cell in cells], skipped={})
        folder = RunFolder.create(path, plan, describe_machine(nvml, reason))
        lent = stack.enter_context(lent_packages([cells[0].precision]))
        quiet = Watcher(Console(file=StringIO()), len(cells))
        context = RunContext(folder, quiet, nvml, IdleGpu(None), lent, timeout_s=600)
        worker = stack.enter_context(CellWorker(cells[0], context))
        yield OneWorker(worker, cells, folder)
