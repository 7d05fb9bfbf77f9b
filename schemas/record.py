"""Records: the raw facts of a run, as stored on disk. Every figure is derived from them."""

import msgspec

from schemas.environment import Environment
from schemas.frames import (
    Done,
    Failed,
    Loaded,
    Peaks,
    Phase,
    Profile,
    Ready,
    SetUp,
    Trial,
    WarmedUp,
)
from schemas.job import Job
from schemas.options import Options

SCHEMA_VERSION = 1


class GpuState(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU's state at one instant, from NVML; None for values that NVML does not report."""

    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    clock_limits: list[str] | None = None
    """What throttles the clocks, by NVML's names in lower case, e.g. `sw_power_cap`; idling is not listed."""
    power_limited_s: float | None = None
    """NVML's counter of time throttled by the power limit; read only at phase edges."""
    thermal_limited_s: float | None = None
    """The same counter for thermal throttling."""


class ForeignProcess(msgspec.Struct, frozen=True, kw_only=True):
    """A process on the GPU that does not belong to the worker."""

    pid: int
    used_bytes: int | None = None
    """None if the driver does not report it."""


class MemoryReading(msgspec.Struct, frozen=True, kw_only=True):
    """One reading of memory from outside the worker.

    `process_bytes` and `device_bytes` are NVML's; without an NVIDIA GPU, `process_bytes` is the worker's
    resident set. Values that could not be read are None, and `reason` explains why.
    """

    at_ns: int
    process_bytes: int | None = None
    device_bytes: int | None = None
    reason: str | None = None
    others: list[ForeignProcess] | None = None
    """Other processes on the GPU; None if they were not listed, as in samples, or when the worker's pid is
    hidden and it may be one of them."""
    gpu: GpuState | None = None
    """None without an NVIDIA GPU."""


class PhaseEdge(msgspec.Struct, frozen=True, kw_only=True):
    """The worker's and the parent's view of one synchronized instant."""

    phase: Phase
    reading: MemoryReading | None = None


class SamplerStats(msgspec.Struct, frozen=True, kw_only=True):
    """Cost and quality of the sampling; `source` is `nvml` or `resident-set`."""

    source: str
    samples: int
    period_s: float
    """Median time between samples."""
    cpu_s: float
    """CPU time of the sampling thread."""
    wall_s: float
    median_call_s: float | None = None
    """Time to read one sample; None in older records."""
    longest_call_s: float | None = None
    missed: int | None = None
    """Samples missing from gaps longer than twice the requested period."""
    enumerations: int | None = None
    """How often processes were listed, which takes a lock in the driver."""


class Leftover(msgspec.Struct, frozen=True, kw_only=True):
    """GPU memory still in use when a worker was started, despite waiting for its release."""

    over_baseline_bytes: int
    """In excess of the use before the run's first worker."""
    waited_s: float
    holders: list[ForeignProcess] | None = None
    """All processes that NVML listed then; None if it could not list them."""


class Skipped(msgspec.Struct, frozen=True, kw_only=True, tag_field="frame", tag="skipped"):
    """The cell was skipped without starting a worker."""

    reason: str


class CellRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Everything recorded about a cell: a line of `records.jsonl`."""

    precision: str
    label: str
    bits_per_weight: float
    outcome: Done | Failed | Skipped
    job: Job | None = None
    started_at: str | None = None
    """UTC, ISO 8601."""
    began_ns: int | None = None
    """The same instant on the clock of frames and samples."""
    wall_s: float | None = None
    ready: Ready | None = None
    loaded: Loaded | None = None
    setup: SetUp | None = None
    warmed_up: WarmedUp | None = None
    edges: list[PhaseEdge] = []
    """The worker's up to its first set-up, then the cell's own."""
    trials: list[Trial] = []
    profile: Profile | None = None
    samples: list[MemoryReading] = []
    baseline_device_bytes: int | None = None
    """Memory in use on the whole device, by NVML, just before the worker was started."""
    leftover: Leftover | None = None
    """None if no more memory was in use than at the run's beginning."""
    nvml_uuid: str | None = None
    """The device that NVML read: the GPU that the worker named, or its MIG slice, `MIG-…`."""
    sampler: SamplerStats | None = None
    log: str | None = None
    """The worker's log, relative to the run folder; all cells of a worker share it."""
    schema_version: int = SCHEMA_VERSION


class Datasheet(msgspec.Struct, frozen=True, kw_only=True):
    """The vendor's published figures for a GPU: dense rates at boost clock."""

    source: str
    read_bytes_per_s: float
    matrix_flop_per_s: dict[str, float]
    """Torch dtype → rate."""


class PeaksRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The device's peaks in this run: `peaks.json` of a run folder."""

    outcome: Peaks | Failed
    wall_s: float
    """Of the whole process, including imports."""
    ready: Ready | None = None
    datasheet: Datasheet | None = None
    """None for an unknown GPU."""


class RunPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a run is to measure: `plan.json` of a run folder."""

    command: list[str]
    options: Options
    jobs: list[Job]
    skipped: dict[str, str]
    """Precision → why it has no jobs."""
    cwd: str | None = None
    """Working directory of the run; relative paths in the options start there."""
    schema_version: int = SCHEMA_VERSION


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of a run folder."""

    plan: RunPlan
    environment: Environment
    cells: list[CellRecord]
    peaks: PeaksRecord | None = None
