"""The device's peak rates, measured once a run by a separate worker and used by every row."""

import time
from pathlib import Path

from orchestrator.execution.worker_session import WorkerSession, WorkerStart
from orchestrator.hardware.datasheet import find_datasheet
from schemas.frames import Failed, Peaks
from schemas.job import Job, ModelSource, Workload
from schemas.record import PeaksRecord

PEAKS_WORKER = "workers.peaks"


def measure_peaks(start: WorkerStart, device: str, cache_folder: Path, timeout_s: float) -> PeaksRecord:
    """Measure `device`, named as in torch, with the worker `PEAKS_WORKER`. A failure goes into the record.

    Takes about 5 seconds and the import of torch.
    """
    start_s = time.monotonic()
    outcome: Peaks | Failed = Failed(kind="crashed", message="the worker sent no result")
    with WorkerSession(start, timeout_s, sample_memory=False) as session:
        for frame, _ in session.events(_job(device, cache_folder)):
            if isinstance(frame, Peaks | Failed):
                outcome = frame
    ready = session.seen.ready
    return PeaksRecord(
        outcome=outcome,
        wall_s=time.monotonic() - start_s,
        ready=ready,
        datasheet=find_datasheet(ready.device_name) if ready else None,
    )


def _job(device: str, cache_folder: Path) -> Job:
    """A Job that only names the device: it has neither weights nor prompts."""
    return Job(
        precision="peaks",
        model=ModelSource(kind="random", location="none", name="none"),
        workload=Workload(prompts=[]),
        device=device,
        packages=["torch"],
        cache_folder=str(cache_folder),
    )
