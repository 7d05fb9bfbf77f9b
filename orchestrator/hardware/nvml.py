"""NVML: what the driver itself says about GPUs, their memory, the processes on them, and how they run.

This is the only module that touches pynvml. NVML is asked, never CUDA: a CUDA context in the parent
would take some hundred megabytes on the very GPU whose memory is being measured.

Devices are addressed by UUID. NVML counts GPUs in PCI bus order, CUDA may count them by speed or leave
some out (`CUDA_VISIBLE_DEVICES`), so an index means two things and a UUID only one.

A GPU in MIG mode is cut into slices, each with memory of its own and a UUID, `MIG-…`. To CUDA a slice is a
GPU, so it is the slice's memory that is asked for; clocks, temperature and power only the whole GPU has.

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

MIG = "MIG-"
"""How the UUID of a slice begins."""

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
    whole: Any
    """Handle of the GPU that this is a MIG slice of; of one that is no slice its own."""
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
    """A slice's UUID as NVML itself spells it: there is an older form, `MIG-GPU-…/gi/ci`."""
    handle = _told(pynvml.nvmlDeviceGetHandleByUUID, uuid.strip())
    return None if handle is None else _told(pynvml.nvmlDeviceGetUUID, handle)


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


def _slices(handle: Any) -> list[str] | None:
    """UUIDs of the GPU's MIG slices; None where it is not in MIG mode."""
    mode = _told(pynvml.nvmlDeviceGetMigMode, handle)  # current and pending; refused by what knows no MIG
    if mode is None or mode[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
        return None
    places = range(_told(pynvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0)
    found = (_told(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, place) for place in places)
    return [str(pynvml.nvmlDeviceGetUUID(slice_)) for slice_ in found if slice_ is not None]


Listed = list[tuple[int, int | None]]
"""(pid, bytes) of processes on a GPU; bytes is None where the driver won't say."""


def share_of(pid: int, listed: Listed) -> tuple[int | None, str | None]:
    """(bytes that one of the listed processes uses, None), or (None, why they are not known)."""
    entries = [used for listed_pid, used in listed if listed_pid == pid]
    known = [used for used in entries if used is not None]
    if not entries:
        return None, f"NVML lists no process {pid}: it has no CUDA context, or a container hides pids"
    if len(known) < len(entries):
        return None, "the driver does not tell how much memory a single process uses"
    return sum(known), None


class Nvml:
    """An open NVML session; made by `Nvml.open()`. Threads may share it, as NVML itself allows."""

    driver: str
    """Version of the kernel driver, e.g. `580.95.05`."""

    def __init__(self) -> None:
        self._devices: dict[str, _Device] = {}
        self._slices: dict[str, list[str]] = {}
        """UUID of a GPU in MIG mode → those of its slices."""
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

    def uuids(self) -> list[str]:
        """All that can be asked for its memory: GPUs, and the slices of those in MIG mode."""
        return [uuid for gpu in self._gpus for uuid in (gpu.uuid, *self._slices.get(gpu.uuid, []))]

    def uuid_of(self, told: str, visible: str | None) -> str:
        """Under which UUID NVML knows what a worker computes on: the GPU that torch named, or a MIG slice.

        In a slice torch may give the slice's UUID, though with `GPU-` before it, or that of the whole GPU,
        as CUDA's version has it. Then `visible`, CUDA_VISIBLE_DEVICES, may name the slice, or there is
        only one. Where none of that tells, it is the whole GPU.
        """
        same = MIG + told.removeprefix("GPU-")
        if any(same in slices for slices in self._slices.values()):
            return same
        slices = self._slices.get(told, [])
        named = [entry for entry in (visible or "").split(",") if entry.startswith(MIG)]
        candidates = [_canonical(named[0])] if len(named) == 1 else slices
        return candidates[0] if len(candidates) == 1 and candidates[0] in slices else told

    def device_bytes(self, uuid: str) -> int:
        """Bytes in use on the GPU, by all processes together. Raises NvmlUnavailable."""
        with _plain_errors():
            return int(self._device(uuid).memory().used)

    def processes(self, uuid: str) -> Listed:
        """(pid, bytes) of each compute process on the GPU; bytes is None where the driver won't say.

        A process may stand in the list more than once. Raises NvmlUnavailable.
        """
        with _plain_errors():
            listed = pynvml.nvmlDeviceGetComputeRunningProcesses(self._device(uuid).handle)
        return [(process.pid, process.usedGpuMemory) for process in listed]

    def process_bytes(self, uuid: str, pid: int) -> tuple[int | None, str | None]:
        """(bytes that one process uses on the GPU, None), or (None, why they are not known)."""
        try:
            return share_of(pid, self.processes(uuid))
        except NvmlUnavailable as error:
            return None, str(error)

    def state(self, uuid: str, counters: bool) -> GpuState:
        """How the GPU runs now; `counters` adds the driver's counters of time under restraint, in seconds.

        Raises NvmlUnavailable where the GPU itself does not answer.
        """
        with _plain_errors():
            handle = self._device(uuid).whole
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
        """The GPU; or a slice of it, where in MIG mode only those with privileges may ask for the whole."""
        try:
            return self._device(uuid)
        except pynvml.NVMLError_NoPermission:
            slices = [self._device(slice_) for slice_ in self._slices[uuid]]
            if not slices:
                raise
            return max(slices, key=lambda device: int(device.memory().total))
