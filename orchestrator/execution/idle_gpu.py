"""The GPU between two workers: as empty as when the run began, or a record that says it was not.

A worker's memory goes back to the driver when the process ends, most often before it can be waited for. A
driver may take longer, and a child that outlived its worker holds on to its share. The next worker's figures
would then be taken on a GPU that is not free. So the first look decides, and nearly always costs nothing;
where it finds the GPU fuller than before, the GPU is waited for, and what remains then is told rather than
hidden.
"""

import time

from orchestrator.hardware.nvml import Nvml, NvmlUnavailable
from schemas.frames import Ready
from schemas.record import ForeignProcess, Leftover

PATIENCE_S = 10.0
LOOK_EVERY_S = 0.1
TOLERANCE_BYTES = 32 * 2**20
"""Far less than the smallest CUDA context; the driver's own use wanders by some MiB."""


def idle_bytes(nvml: Nvml) -> dict[str, int]:
    """Bytes now in use on each GPU and MIG slice that answers, by UUID."""
    idle = {}
    for uuid in nvml.uuids():
        try:
            idle[uuid] = nvml.device_bytes(uuid)
        except NvmlUnavailable:
            continue  # the sampler will say so, with its reason, if this is the GPU that is used
    return idle


class IdleGpu:
    """The GPU that a run's workers take, one after the other; made before the first of them.

    Only a worker can say which one it is, so there is nothing to wait for until `note` was told.
    """

    def __init__(self, nvml: Nvml | None) -> None:
        self.nvml = nvml
        self.patience_s = PATIENCE_S
        self._first_bytes = idle_bytes(nvml) if nvml else {}
        self._uuid: str | None = None

    def note(self, ready: Ready | None) -> None:
        """Learn from a worker which GPU the run is on."""
        if self.nvml and ready and ready.device_uuid:
            self._uuid = self.nvml.uuid_of(ready.device_uuid, ready.cuda_visible_devices)

    def wait(self) -> Leftover | None:
        """Return once the GPU is as empty as at first, or after `patience_s` with what is still there."""
        start_s = time.monotonic()
        while (over_bytes := self._over_bytes()) is not None and over_bytes > TOLERANCE_BYTES:
            waited_s = time.monotonic() - start_s
            if waited_s >= self.patience_s:
                self.patience_s = 0.0  # what did not go away now need not be waited for again
                return Leftover(over_baseline_bytes=over_bytes, waited_s=waited_s, holders=self._holders())
            time.sleep(LOOK_EVERY_S)
        return None

    def _over_bytes(self) -> int | None:
        """More than at first; None where it is not known."""
        if self.nvml is None or self._uuid not in self._first_bytes:
            return None
        try:
            return self.nvml.device_bytes(self._uuid) - self._first_bytes[self._uuid]
        except NvmlUnavailable:
            return None

    def _holders(self) -> list[ForeignProcess] | None:
        if self.nvml is None or self._uuid is None:
            return None
        try:
            listed = self.nvml.processes(self._uuid)
        except NvmlUnavailable:
            return None
        return [ForeignProcess(pid=pid, used_bytes=used) for pid, used in listed]
