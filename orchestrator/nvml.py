"""NVML: what the driver itself says about GPUs, their memory, the processes on them, and how they run.

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

How a GPU runs is told by single figures: clocks, temperature, power, what holds the clocks down. Many a
GPU gives only some of them, so one that is refused is None by itself. Power is an average over about a
second on most GPUs since Ampere, an instant's value on older ones.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

import pynvml

from schemas.environment import Gpu
from schemas.record import GpuState

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

_CLOCK_LIMITS: dict[int, str] = {
    pynvml.nvmlClocksEventReasonApplicationsClocksSetting: "applications_clocks_setting",
    pynvml.nvmlClocksEventReasonSwPowerCap: "sw_power_cap",
    pynvml.nvmlClocksEventReasonHwSlowdown: "hw_slowdown",
    pynvml.nvmlClocksEventReasonSyncBoost: "sync_boost",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "sw_thermal_slowdown",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "hw_thermal_slowdown",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "hw_power_brake_slowdown",
    pynvml.nvmlClocksEventReasonDisplayClockSetting: "display_clock_setting",
}
"""Bit → name. Idling has a bit too, but limits nothing."""


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


def _told(call: Callable[..., Any], *arguments: Any) -> Any:
    """What the driver answers, or None where it won't give this one figure.

    Raises `pynvml.NVMLError_GpuIsLost`: then no figure is to be had.
    """
    try:
        return call(*arguments)
    except pynvml.NVMLError_GpuIsLost:
        raise
    except (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError):
        return None


def _clock_limits(handle: Any) -> list[str] | None:
    bits = _told(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle)  # drivers before 535 lack it
    return None if bits is None else [name for bit, name in _CLOCK_LIMITS.items() if bits & bit]


def _power_w(handle: Any) -> float | None:
    power_mw = _told(pynvml.nvmlDeviceGetPowerUsage, handle)
    return None if power_mw is None else power_mw / 1e3


def _limited_s(handle: Any, policy: int) -> float | None:
    counter = _told(pynvml.nvmlDeviceGetViolationStatus, handle, policy)
    return None if counter is None else counter.violationTime / 1e9


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

    def state(self, uuid: str, counters: bool) -> GpuState:
        """How the GPU runs now; `counters` adds the driver's counters of time under restraint, in seconds.

        Raises NvmlUnavailable where the GPU itself does not answer.
        """
        with _plain_errors():
            handle = self._device(uuid).handle
            return GpuState(
                sm_clock_mhz=_told(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
                memory_clock_mhz=_told(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM),
                # Deprecated, but older drivers lack the call that takes its place.
                temperature_c=_told(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
                power_w=_power_w(handle),
                clock_limits=_clock_limits(handle),
                power_limited_s=_limited_s(handle, pynvml.NVML_PERF_POLICY_POWER) if counters else None,
                thermal_limited_s=_limited_s(handle, pynvml.NVML_PERF_POLICY_THERMAL) if counters else None,
            )

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
