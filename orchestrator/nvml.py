"""NVML: what the driver itself says about GPUs, their memory and the processes on them.

This is the only module that touches pynvml. NVML is asked, never CUDA: a CUDA context in the parent
would take some hundred megabytes on the very GPU whose memory is being measured.

Devices are addressed by UUID. NVML counts GPUs in PCI bus order, CUDA may count them by speed or leave
some out (`CUDA_VISIBLE_DEVICES`), so an index means two things and a UUID only one.

Two figures stand beside each other:

- device bytes, all that is in use on the GPU, whoever uses it. Version 2 of the call reports what the
  driver reserves for itself apart from `used`; version 1 counts it in. Old drivers have only version 1,
  so the version that answered is remembered with the GPU;
- process bytes, one process's share: context, modules and allocations. The driver takes a lock while it
  lists processes, and it may not know the share (WDDM) or the pid (containers): then it is None.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

import pynvml

from schemas.environment import Gpu

_REASONS: dict[int, str] = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "no NVIDIA driver library (libnvidia-ml.so.1) on this machine",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "NVIDIA's library is here, but its kernel driver is not loaded",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
        "NVIDIA's library and kernel driver differ in version: reboot, or restart the container"
    ),
    pynvml.NVML_ERROR_GPU_NOT_FOUND: "the NVIDIA driver is here, but no GPU",
    pynvml.NVML_ERROR_GPU_IS_LOST: "the GPU is lost: it fell off the bus or hangs (see dmesg)",
    pynvml.NVML_ERROR_NOT_FOUND: "NVML knows no GPU of this UUID",
}

_NO_MEMORY_INFO_V2 = (
    pynvml.NVMLError_FunctionNotFound,
    pynvml.NVMLError_NotSupported,
    pynvml.NVMLError_ArgumentVersionMismatch,
)


class NvmlUnavailable(Exception):
    """NVML is not here or does not answer; the message is one plain line that says why."""


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Turn what pynvml raises into NvmlUnavailable."""
    try:
        yield
    except pynvml.NVMLLibraryMismatchError as error:  # no subclass of NVMLError
        raise NvmlUnavailable("the NVIDIA driver is too old for this call of nvidia-ml-py") from error
    except pynvml.NVMLError as error:
        raise NvmlUnavailable(_REASONS.get(error.value, f"NVML: {error}")) from error


@dataclass(frozen=True)
class _Device:
    handle: Any
    memory_info_version: int

    def memory(self) -> Any:
        """NVML's memory struct: `total`, `used` and `free`, in bytes."""
        version = pynvml.nvmlMemory_v2 if self.memory_info_version == 2 else None
        return pynvml.nvmlDeviceGetMemoryInfo(self.handle, version)


def _find_device(uuid: str) -> _Device:
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    try:
        pynvml.nvmlDeviceGetMemoryInfo(handle, pynvml.nvmlMemory_v2)
    except _NO_MEMORY_INFO_V2:
        return _Device(handle, memory_info_version=1)
    return _Device(handle, memory_info_version=2)


class Nvml:
    """An open NVML session; made by `Nvml.open()`. Threads may share it, as NVML itself allows."""

    driver: str
    """Version of the kernel driver, e.g. `580.95.05`."""

    def __init__(self) -> None:
        self._devices: dict[str, _Device] = {}
        with _plain_errors():
            self.driver = pynvml.nvmlSystemGetDriverVersion()
            count = pynvml.nvmlDeviceGetCount()
        self._gpus = self._readable_gpus(count)

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[Self]:
        """Initialise NVML for the length of a `with`.

        Raises NvmlUnavailable: no driver, no GPU, or none that answers.
        """
        with _plain_errors():
            pynvml.nvmlInit()
        try:
            yield cls()
        finally:
            with suppress(pynvml.NVMLError):  # a driver that died must not hide what the body raised
                pynvml.nvmlShutdown()

    def gpus(self) -> list[Gpu]:
        """The GPUs that answered when NVML was opened: at least one, in NVML's order."""
        return list(self._gpus)

    def device_bytes(self, uuid: str) -> int:
        """Bytes in use on the GPU, by all processes together. Raises NvmlUnavailable."""
        with _plain_errors():
            return int(self._device(uuid).memory().used)

    def processes(self, uuid: str) -> list[tuple[int, int | None]]:
        """(pid, bytes) of each compute process on the GPU; bytes is None where the driver won't say.

        A process may stand in the list more than once. Raises NvmlUnavailable.
        """
        with _plain_errors():
            listed = pynvml.nvmlDeviceGetComputeRunningProcesses(self._device(uuid).handle)
        return [(process.pid, process.usedGpuMemory) for process in listed]

    def process_bytes(self, uuid: str, pid: int) -> tuple[int | None, str | None]:
        """(bytes that one process uses on the GPU, None), or (None, why they are not known)."""
        try:
            entries = [used for listed, used in self.processes(uuid) if listed == pid]
        except NvmlUnavailable as error:
            return None, str(error)
        known = [used for used in entries if used is not None]
        if not entries:
            return None, f"NVML lists no process {pid}: it has no CUDA context, or a container hides pids"
        if len(known) < len(entries):
            return None, "the driver does not tell how much memory a single process uses"
        return sum(known), None

    def _device(self, uuid: str) -> _Device:
        if uuid not in self._devices:
            self._devices[uuid] = _find_device(uuid)
        return self._devices[uuid]

    def _readable_gpus(self, count: int) -> list[Gpu]:
        """NVML also counts GPUs that this user or container may not touch; those are left out."""
        gpus, reason = [], _REASONS[pynvml.NVML_ERROR_GPU_NOT_FOUND]
        for index in range(count):
            try:
                gpus.append(self._describe(index))
            except NvmlUnavailable as error:
                reason = f"GPU {index}: {error}"
        if not gpus:
            raise NvmlUnavailable(reason)
        return gpus

    @_plain_errors()
    def _describe(self, index: int) -> Gpu:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        uuid = pynvml.nvmlDeviceGetUUID(handle)
        device = self._device(uuid)
        return Gpu(
            index=index,
            uuid=uuid,
            name=pynvml.nvmlDeviceGetName(handle),
            memory_bytes=device.memory().total,
            compute_capability=pynvml.nvmlDeviceGetCudaComputeCapability(handle),
            memory_info_version=device.memory_info_version,
        )
