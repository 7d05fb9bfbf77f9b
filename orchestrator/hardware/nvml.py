"""NVML: the driver's figures for GPUs, their memory, their processes, and their clocks and power.

This is the only module that uses pynvml. The parent asks NVML rather than CUDA because a CUDA context
would occupy a few hundred megabytes on the very GPU whose memory is being measured.

Devices are addressed by UUID. NVML numbers GPUs in PCI bus order; CUDA may number them by speed or hide
some (`CUDA_VISIBLE_DEVICES`), so an index is ambiguous and a UUID is not.

A GPU in MIG mode is divided into slices, each with its own memory and a UUID, `MIG-…`. CUDA treats a slice
as a GPU, so the slice's memory is read; clocks, temperature and power exist only for the whole GPU.

There are two memory figures:

- device bytes: everything in use on the GPU, including other processes. Version 2 of the call reports the
  driver's own reservation separately from `used`; version 1 includes it. Old drivers only have version 1,
  so the version that answered is kept with the GPU;
- process bytes: one process's context, modules and allocations. The driver takes a lock while it lists
  processes, and it may not know the share (WDDM) or the pid (containers), in which case it is None.

Clocks, temperature, power and clock limits are read one by one. Many GPUs support only some of
them, so each figure that is refused is None. On most GPUs since Ampere, power is an average over about a
second; on older ones it is instantaneous.
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
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: (
        "NVIDIA's driver library is installed, but its kernel driver is not loaded"
    ),
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
        "NVIDIA's driver library and kernel driver differ in version: reboot, or restart the container"
    ),
    pynvml.NVML_ERROR_GPU_NOT_FOUND: "the NVIDIA driver is loaded, but there is no GPU",
    pynvml.NVML_ERROR_GPU_IS_LOST: "the GPU is lost: it fell off the bus or hung (see dmesg)",
    pynvml.NVML_ERROR_NOT_FOUND: "NVML knows no GPU of this UUID",
}

MIG = "MIG-"
"""Prefix of a slice's UUID."""

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
"""Bit → name. Idle has a bit too, but is not a limit."""


class NvmlUnavailable(Exception):
    """NVML is missing or does not answer; the message gives the reason in one line."""


@contextmanager
def _nvml_errors() -> Iterator[None]:
    """Turn pynvml's errors into NvmlUnavailable."""
    try:
        yield
    except pynvml.NVMLLibraryMismatchError as error:  # not a subclass of NVMLError
        raise NvmlUnavailable("the NVIDIA driver is too old for this call of nvidia-ml-py") from error
    except pynvml.NVMLError as error:
        raise NvmlUnavailable(_REASONS.get(error.value, f"NVML: {error}")) from error


@dataclass(frozen=True)
class _Device:
    handle: Any
    whole: Any
    """The handle of the GPU that this MIG slice is part of; the same handle if it is not a slice."""
    memory_info_version: int

    def memory(self) -> Any:
        """NVML's memory struct: `total`, `used` and `free`, in bytes."""
        version = pynvml.nvmlMemory_v2 if self.memory_info_version == 2 else None
        return pynvml.nvmlDeviceGetMemoryInfo(self.handle, version)


def _find_device(uuid: str) -> _Device:
    handle = whole = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    if uuid.startswith(MIG):
        whole = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
    try:
        pynvml.nvmlDeviceGetMemoryInfo(handle, pynvml.nvmlMemory_v2)
    except _NO_MEMORY_INFO_V2:
        return _Device(handle, whole, memory_info_version=1)
    return _Device(handle, whole, memory_info_version=2)


def _canonical(uuid: str) -> str | None:
    """A slice's UUID as NVML spells it; an older form is `MIG-GPU-…/gi/ci`."""
    handle = _optional(pynvml.nvmlDeviceGetHandleByUUID, uuid.strip())
    return None if handle is None else _optional(pynvml.nvmlDeviceGetUUID, handle)


def _optional(call: Callable[..., Any], *arguments: Any) -> Any:
    """The driver's answer, or None if it refuses this figure.

    Raises `pynvml.NVMLError_GpuIsLost`, since no figure is available then.
    """
    try:
        return call(*arguments)
    except pynvml.NVMLError_GpuIsLost:
        raise
    except (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError):
        return None


def _clock_limits(handle: Any) -> list[str] | None:
    bits = _optional(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle)  # drivers before 535 lack it
    return None if bits is None else [name for bit, name in _CLOCK_LIMITS.items() if bits & bit]


def _power_w(handle: Any) -> float | None:
    power_mw = _optional(pynvml.nvmlDeviceGetPowerUsage, handle)
    return None if power_mw is None else power_mw / 1e3


def _limited_s(handle: Any, policy: int) -> float | None:
    counter = _optional(pynvml.nvmlDeviceGetViolationStatus, handle, policy)
    return None if counter is None else counter.violationTime / 1e9


def _slices(handle: Any) -> list[str] | None:
    """UUIDs of the GPU's MIG slices; None if it is not in MIG mode."""
    mode = _optional(pynvml.nvmlDeviceGetMigMode, handle)  # current and pending; refused by GPUs without MIG
    if mode is None or mode[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
        return None
    indices = range(_optional(pynvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0)
    found = (_optional(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index) for index in indices)
    return [str(pynvml.nvmlDeviceGetUUID(slice_)) for slice_ in found if slice_ is not None]


Listed = list[tuple[int, int | None]]
"""(pid, bytes) of processes on a GPU; bytes is None if the driver doesn't report it."""

NO_PER_PROCESS_MEMORY = "the driver does not report memory per process"


def share_of(pid: int, listed: Listed) -> tuple[int | None, str | None]:
    """(bytes that one of the listed processes uses, None), or (None, why that is unknown)."""
    entries = [used for listed_pid, used in listed if listed_pid == pid]
    known = [used for used in entries if used is not None]
    if not entries:
        return None, f"NVML lists no process {pid}: it has no CUDA context, or a container hides pids"
    if len(known) < len(entries):
        return None, NO_PER_PROCESS_MEMORY
    return sum(known), None


class Nvml:
    """An open NVML session; made by `Nvml.open()`. It is thread-safe, as NVML is."""

    driver: str
    """Version of the kernel driver, e.g. `580.95.05`."""

    def __init__(self) -> None:
        self._devices: dict[str, _Device] = {}
        self._slices: dict[str, list[str]] = {}
        """UUID of a GPU in MIG mode → UUIDs of its slices."""
        with _nvml_errors():
            self.driver = pynvml.nvmlSystemGetDriverVersion()
            count = pynvml.nvmlDeviceGetCount()
        self._gpus = self._readable_gpus(count)

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[Self]:
        """Initialize NVML for the duration of a `with` block.

        Raises NvmlUnavailable if there is no driver, no GPU, or none that answers.
        """
        with _nvml_errors():
            pynvml.nvmlInit()
        try:
            yield cls()
        finally:
            with suppress(pynvml.NVMLError):  # an error here must not hide one that the body raised
                pynvml.nvmlShutdown()

    def gpus(self) -> list[Gpu]:
        """The GPUs that answered when NVML was opened: at least one, in NVML's order."""
        return list(self._gpus)

    def uuids(self) -> list[str]:
        """Everything whose memory can be read: GPUs, and the slices of those in MIG mode."""
        return [uuid for gpu in self._gpus for uuid in (gpu.uuid, *self._slices.get(gpu.uuid, []))]

    def uuid_of(self, torch_uuid: str, visible: str | None) -> str:
        """NVML's UUID of the device that a worker computes on: the GPU that torch named, or a MIG slice.

        For a slice torch may report the slice's UUID but prefixed with `GPU-`, or the whole GPU's, depending
        on the CUDA version. Then `visible` (CUDA_VISIBLE_DEVICES) may name the slice, or there is only one.
        Otherwise the whole GPU is returned.
        """
        same = MIG + torch_uuid.removeprefix("GPU-")
        if any(same in slices for slices in self._slices.values()):
            return same
        slices = self._slices.get(torch_uuid, [])
        named = [entry for entry in (visible or "").split(",") if entry.startswith(MIG)]
        candidates = [_canonical(named[0])] if len(named) == 1 else slices
        return candidates[0] if len(candidates) == 1 and candidates[0] in slices else torch_uuid

    def device_bytes(self, uuid: str) -> int:
        """Bytes in use on the GPU by all processes. Raises NvmlUnavailable."""
        with _nvml_errors():
            return int(self._device(uuid).memory().used)

    def processes(self, uuid: str) -> Listed:
        """(pid, bytes) of each compute process on the GPU; bytes is None if the driver doesn't report it.

        A process may be listed more than once. Raises NvmlUnavailable.
        """
        with _nvml_errors():
            listed = pynvml.nvmlDeviceGetComputeRunningProcesses(self._device(uuid).handle)
        return [(process.pid, process.usedGpuMemory) for process in listed]

    def state(self, uuid: str, counters: bool) -> GpuState:
        """Clocks, temperature and power now; `counters` adds the driver's counters of throttled seconds.

        Raises NvmlUnavailable if the GPU does not answer at all.
        """
        with _nvml_errors():
            handle = self._device(uuid).whole
            return GpuState(
                sm_clock_mhz=_optional(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
                memory_clock_mhz=_optional(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM),
                # Deprecated, but older drivers lack its replacement.
                temperature_c=_optional(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
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
        """NVML also counts GPUs that this user or container can't access; those are omitted."""
        gpus, reason = [], _REASONS[pynvml.NVML_ERROR_GPU_NOT_FOUND]
        for index in range(count):
            try:
                gpus.append(self._describe(index))
            except NvmlUnavailable as error:
                reason = f"GPU {index}: {error}"
        if not gpus:
            raise NvmlUnavailable(reason)
        return gpus

    @_nvml_errors()
    def _describe(self, index: int) -> Gpu:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        uuid = pynvml.nvmlDeviceGetUUID(handle)
        slices = _slices(handle)
        self._slices[uuid] = slices or []
        device = self._largest_readable(uuid)
        return Gpu(
            index=index,
            uuid=uuid,
            name=pynvml.nvmlDeviceGetName(handle),
            memory_bytes=device.memory().total,
            compute_capability=pynvml.nvmlDeviceGetCudaComputeCapability(handle),
            memory_info_version=device.memory_info_version,
            mig=slices is not None,
        )

    def _largest_readable(self, uuid: str) -> _Device:
        """The GPU, or its largest slice: in MIG mode, reading the whole GPU may need privileges."""
        try:
            return self._device(uuid)
        except pynvml.NVMLError_NoPermission:
            slices = [self._device(slice_) for slice_ in self._slices[uuid]]
            if not slices:
                raise
            return max(slices, key=lambda device: int(device.memory().total))
