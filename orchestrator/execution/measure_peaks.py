"""The device's peaks: measured by a worker of its own, once a run, and asked for by every row."""

import time
from pathlib import Path

from orchestrator.execution.worker_process import WorkerProcess
from orchestrator.hardware.datasheet import find_datasheet
from orchestrator.precisions.interpreter import Interpreter, worker_command, worker_environment
from schemas.frames import Failed, Peaks, Phase, Ready
from schemas.job import Job, ModelSource, Workload
from schemas.record import PeaksRecord

WORKER = "workers.peaks"


def measure_peaks(
    interpreter: Interpreter, device: str, cache_folder: Path, lent: Path, log: Path | None, timeout_s: float
) -> PeaksRecord:
    """Measure `device`, as torch counts it, under this interpreter. What goes wrong stands in the record.

    `lent` is the folder of `lent_packages`. Takes some 5 seconds and the import of torch.
    """
    start_s = time.monotonic()
    ready: Ready | None = None
    outcome: Peaks | Failed = Failed(kind="crashed", message="the worker never spoke")
    command, environment = worker_command(interpreter, WORKER), worker_environment(interpreter, lent)
    with WorkerProcess(command, environment, _job(device, cache_folder), log) as worker:
        for frame in worker.frames(timeout_s):
            match frame:
                case Phase():
                    worker.acknowledge()
                case Ready():
                    ready = frame
                case Peaks() | Failed():
                    outcome = frame
    return PeaksRecord(
        outcome=outcome,
        wall_s=time.monotonic() - start_s,
        ready=ready,
        datasheet=find_datasheet(ready.device_name) if ready else None,
    )


def _job(device: str, cache_folder: Path) -> Job:
    """A Job is what a worker is told its device by; this one has neither weights nor prompts."""
    return Job(
        precision="peaks",
        model=ModelSource(kind="random", location="none", name="none"),
        workload=Workload(prompts=[]),
        device=device,
        packages=["torch"],
        cache_folder=str(cache_folder),
    )
