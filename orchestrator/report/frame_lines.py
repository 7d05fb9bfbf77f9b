"""Frames as readable text, one line each, for a worker in the foreground."""

from orchestrator.units import counted, duration, mib, milliseconds, rate
from schemas.frames import (
    AnyFrame,
    Done,
    Failed,
    Loaded,
    Peaks,
    Phase,
    Prepared,
    Profile,
    Progress,
    Ready,
    SetUp,
    Trial,
    Waiting,
    WarmedUp,
)
from schemas.record import MemoryReading


def describe(frame: AnyFrame, reading: MemoryReading | None) -> str:
    """One line for a frame; `reading` is the memory that the parent read at a phase edge."""
    match frame:
        case Phase():
            return f"{_phase(frame)}{_memory(frame, reading)}"
        case Ready():
            return f"ready     {_ready(frame)}"
        case Progress():
            return f"          {frame.message} {frame.done}/{frame.total}"
        case Prepared():
            return f"prepared  {frame.folder}, with {frame.calibration}"
        case Loaded():
            return f"loaded    {_loaded(frame)}"
        case SetUp():
            return f"set up    in {duration(frame.setup_s)}{_compiled(frame)}"
        case WarmedUp():
            times = ", ".join(milliseconds(seconds) for seconds in frame.trial_s)
            return f"warmed up in {counted(len(frame.trial_s), 'trial')}: {times} ms"
        case Trial():
            return f"trial {frame.index:<3} {_trial(frame)}"
        case Profile():
            return f"profile   {frame.reason or _kernels(frame)}"
        case Peaks():
            return f"peaks     {rate(frame.read_bytes_per_s / 1e9)} GB/s read"
        case Waiting():
            return "waiting   for another job"
        case Done():
            answer = f": {frame.sample_text!r}" if frame.sample_text is not None else ""
            return f"done      {frame.trials_measured} of {counted(frame.trials_planned, 'trial')}{answer}"
        case Failed():
            hint = f" ({frame.hint})" if frame.hint else ""
            return f"failed    {frame.kind}: {frame.message}{hint}"


def _ready(frame: Ready) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in frame.versions.items())
    return f"pid {frame.pid}, {frame.device_name}, Python {frame.python}, {versions}"


def _loaded(frame: Loaded) -> str:
    stored = ", ".join(f"{mib(size)} MiB {dtype}" for dtype, size in frame.weight_bytes.items())
    layers = ", ".join(f"{count} {name}" for name, count in frame.linear_classes.items())
    return f"{frame.parameters:,} parameters in {stored}; {layers}"


def _trial(frame: Trial) -> str:
    speed = rate(len(frame.token_s) * frame.batch_size / frame.decode_s if frame.token_s else None)
    return (
        f"{frame.prompt_tokens} + {frame.new_tokens} tokens × {frame.batch_size}: "
        f"prefill {milliseconds(frame.prefill_s)} ms, decode {speed} tok/s"
    )


def _compiled(frame: SetUp) -> str:
    if frame.compile_s is None:
        return ""
    return f", {duration(frame.compile_s)} of which compiling, {frame.graph_breaks} graph breaks"


def _kernels(frame: Profile) -> str:
    parts = []
    for name, times in (("prefill", frame.prefill), ("decode", frame.decode)):
        if times is not None:
            busy = milliseconds(times.busy_s / times.steps)
            parts.append(f"{name} {times.launches / times.steps:,.0f} kernels, {busy} ms busy")
    return ", ".join(parts)


def _phase(frame: Phase) -> str:
    number = "" if frame.trial is None else f" {frame.trial}"
    return f"→ {frame.name + number:<12}"


def _memory(frame: Phase, reading: MemoryReading | None) -> str:
    parts = []
    if frame.torch is not None:
        parts.append(f"torch {mib(frame.torch.allocated_bytes)} MiB allocated")
        parts.append(f"{mib(frame.torch.reserved_bytes)} reserved")
        parts.append(f"{mib(frame.torch.peak_allocated_bytes)} peak")
    if reading is not None and reading.device_bytes is not None:
        parts.append(f"NVML {mib(reading.process_bytes)} MiB process, {mib(reading.device_bytes)} device")
    elif reading is not None:
        parts.append(f"resident set {mib(reading.process_bytes)} MiB")
    return ", ".join(parts)
