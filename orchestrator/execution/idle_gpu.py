"""Between two workers: wait until the GPU is as empty as when the run began, or record that it is not.

A worker's memory returns to the driver when the process ends, usually before we could wait for it. But a
driver may take longer, and a child that outlives its worker keeps its share. The next worker would then be
measured on a GPU that is not free. So we check first, which nearly always costs nothing; if more memory is in
use than at the start, we wait for it to be freed, and record the memory still in use after that.
"""

import time

from orchestrator.hardware.nvml import Nvml, NvmlUnavailable
from schemas.frames import Ready
from schemas.record import ForeignProcess, Leftover

PATIENCE_S = 10.0
LOOK_EVERY_S = 0.1
TOLERANCE_BYTES = 32 * 2**20
"""Far less than the smallest CUDA context; the driver's own use varies by some MiB."""


def idle_bytes(nvml: Nvml) -> dict[str, int]:
    """Bytes in use on each GPU and MIG slice that can be queried, by UUID."""
    idle = {}
    for uuid in nvml.uuids():
        try:
            idle[uuid] = nvml.device_bytes(uuid)
        except NvmlUnavailable:
            continue  # if this is the GPU in use, the sampler reports the reason
    return idle


class IdleGpu:
    """The GPU that a run's workers use in turn; created before the first of them.

    Only a worker knows which GPU that is, so there is nothing to wait for until `note` is called.
    """

    def __init__(self, nvml: Nvml | None) -> None:
        self.nvml = nvml
        self.patience_s = PATIENCE_S
        self._first_bytes = idle_bytes(nvml) if nvml else {}
        self._uuid: str | None = None

    def note(self, ready: Ready | None) -> None:
        """Remember the GPU that the run is on, as reported by a worker."""
        if self.nvml and ready and ready.device_uuid:
            self._uuid = self.nvml.uuid_of(ready.device_uuid, ready.cuda_visible_devices)

    def wait(self) -> Leftover | None:
        """Return once the GPU is as empty as at the start; after `patience_s`, with the memory in use."""
        start_s = time.monotonic()
        while (over_bytes := self._over_bytes()) is not None and over_bytes > TOLERANCE_BYTES:
            waited_s = time.monotonic() - start_s
            if waited_s >= self.patience_s:
                self.patience_s = 0.0  # memory not freed by now isn't waited for again
                return Leftover(over_baseline_bytes=over_bytes, waited_s=waited_s, holders=self._holders())
            time.sleep(LOOK_EVERY_S)
        return None

    def _over_bytes(self) -> int | None:
        """Bytes in use beyond those at the start; None if unknown."""
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
