"""Records: the raw facts of a run as they lie on disk. Every figure is derived from them."""

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
    """How a GPU runs at one instant, from NVML; None for what it would not tell."""

    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    clock_limits: list[str] | None = None
    """What holds the clocks down, by NVML's names in lower case, e.g. `sw_power_cap`; idling is not among
    them."""
    power_limited_s: float | None = None
    """NVML's counter of time spent under the power limit's restraint; read at phase edges alone."""
    thermal_limited_s: float | None = None
    """The same for temperature."""


class ForeignProcess(msgspec.Struct, frozen=True, kw_only=True):
    """A process on the GPU that is no part of the worker."""

    pid: int
    used_bytes: int | None = None
    """None where the driver won't say."""


class MemoryReading(msgspec.Struct, frozen=True, kw_only=True):
    """One look at memory from outside the worker.

    `process_bytes` and `device_bytes` come from NVML, or, without an NVIDIA GPU, `process_bytes` is
    the worker's resident set. What could not be read is None and `reason` says why.
    """

    at_ns: int
    process_bytes: int | None = None
    device_bytes: int | None = None
    reason: str | None = None
    others: list[ForeignProcess] | None = None
    """Who else was on the GPU; None where it was not asked for, as in samples, or can't be told from the
    worker, since its pid is hidden."""
    gpu: GpuState | None = None
    """None without an NVIDIA GPU."""


class PhaseEdge(msgspec.Struct, frozen=True, kw_only=True):
    """The worker's view and the parent's view of one synchronised instant."""

    phase: Phase
    reading: MemoryReading | None = None


class SamplerStats(msgspec.Struct, frozen=True, kw_only=True):
    """What the sampling cost and achieved; `source` is `nvml` or `resident-set`."""

    source: str
    samples: int
    period_s: float
    """Median time between samples."""
    cpu_s: float
    """CPU time of the sampling thread."""
    wall_s: float
    median_call_s: float | None = None
    """How long a sample took to read; None in records of before it was timed."""
    longest_call_s: float | None = None
    missed: int | None = None
    """Samples that fell into gaps of over twice the period asked for."""
    enumerations: int | None = None
    """How often processes were listed, for which the driver takes a lock."""


class Leftover(msgspec.Struct, frozen=True, kw_only=True):
    """Memory that the GPU had not given back when a worker was started, though it was waited for."""

    over_baseline_bytes: int
    """More than before the run's first worker."""
    waited_s: float
    holders: list[ForeignProcess] | None = None
    """All that NVML listed then; None where it would not."""


class Skipped(msgspec.Struct, frozen=True, kw_only=True, tag_field="frame", tag="skipped"):
    """The cell was left out before a worker was started."""

    reason: str


class CellRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Everything known of one precision on one workload: a line of `records.jsonl`."""

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
    """Those of the worker up to its first set-up, then the cell's own."""
    trials: list[Trial] = []
    profile: Profile | None = None
    samples: list[MemoryReading] = []
    baseline_device_bytes: int | None = None
    """NVML's device-wide use just before the worker was started."""
    leftover: Leftover | None = None
    """None where the GPU was as empty as when the run began."""
    nvml_uuid: str | None = None
    """What NVML was asked about: the GPU that the worker named, or the MIG slice of it, `MIG-…`."""
    sampler: SamplerStats | None = None
    log: str | None = None
    """Worker's log, relative to the run folder; cells of one worker share it."""
    schema_version: int = SCHEMA_VERSION


class Datasheet(msgspec.Struct, frozen=True, kw_only=True):
    """What the vendor publishes for a GPU: dense rates at boost clock."""

    source: str
    read_bytes_per_s: float
    matrix_flop_per_s: dict[str, float]
    """Torch dtype → rate."""


class PeaksRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The device's peaks in this run: `peaks.json` of a run folder."""

    outcome: Peaks | Failed
    wall_s: float
    """Of the whole process, imports included."""
    ready: Ready | None = None
    datasheet: Datasheet | None = None
    """None where the GPU is not among those known."""


class RunPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a run set out to do: `plan.json` of a run folder."""

    command: list[str]
    options: Options
    jobs: list[Job]
    skipped: dict[str, str]
    """Precision → why it is not among the jobs."""
    cwd: str | None = None
    """Where it was started, from which relative paths in the options are meant."""
    schema_version: int = SCHEMA_VERSION


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A run folder, read back."""

    plan: RunPlan
    environment: Environment
    cells: list[CellRecord]
    peaks: PeaksRecord | None = None
