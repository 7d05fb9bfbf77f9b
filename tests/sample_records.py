"""Made-up records: what a worker might send and the parent observe, in figures that are easy to check."""

from typing import Any

import msgspec

from schemas.environment import Environment, Gpu
from schemas.frames import (
    Done,
    ForwardCosts,
    Kernel,
    KernelTimes,
    Loaded,
    Peaks,
    Phase,
    PhaseName,
    Profile,
    Ready,
    TorchMemory,
    Trial,
)
from schemas.job import DecodeMode, Job, ModelSource, Workload
from schemas.options import Options
from schemas.record import CellRecord, GpuState, MemoryReading, PeaksRecord, PhaseEdge, Run, RunPlan

MIB = 2**20

H100 = Gpu(
    index=0,
    uuid="GPU-1",
    name="H100",
    memory_bytes=80 * 2**30,
    compute_capability=(9, 0),
    memory_info_version=2,
)
T4 = Gpu(
    index=1,
    uuid="GPU-2",
    name="T4",
    memory_bytes=16 * 2**30,
    compute_capability=(7, 5),
    memory_info_version=2,
)

DONE = Done(at_ns=0, trials_planned=1, trials_measured=1, sample_text="Paris")


def make_job(precision: str = "fp16", **fields: Any) -> Job:
    defaults: dict[str, Any] = {
        "model": ModelSource(kind="folder", location="models/tiny", name="tiny"),
        "workload": Workload(prompts=["one"], new_tokens=5, warmup=1),
        "device": "cuda:0",
        "cache_folder": "cache",
    }
    return Job(precision=precision, **(defaults | fields))


def make_trial(index: int = 0, **fields: Any) -> Trial:
    """Five tokens per row: one from 0.1 s of prefill, four from 0.4 s of decode."""
    defaults: dict[str, Any] = {
        "batch_size": 1,
        "prompt_tokens": 10,
        "new_tokens": 5,
        "prefill_s": 0.1,
        "decode_s": 0.4,
        "token_s": [0.1] * 4,
        "enqueue_s": 0.3,
        "token_ids": [1, 2, 3, 4, 5],
    }
    return Trial(index=index, **(defaults | fields))


def make_ready(uuid: str | None = "GPU-1", **versions: str) -> Ready:
    return Ready(
        pid=7,
        at_ns=0,
        python="3.12.3",
        versions=versions or {"torch": "2.11.0", "transformers": "5.17.0"},
        device="cpu" if uuid is None else "cuda:0",
        device_name="CPU" if uuid is None else "H100",
        device_uuid=uuid,
    )


def make_loaded(weight_bytes: int = 100 * MIB, costs: ForwardCosts | None = None) -> Loaded:
    return Loaded(
        weight_bytes={"float16": weight_bytes},
        linear_classes={},
        compute_dtype="float16",
        parameters=1,
        costs=costs,
    )


def torch_memory(allocated: int, reserved: int | None = None, peak: int | None = None) -> TorchMemory:
    reserved = allocated if reserved is None else reserved
    return TorchMemory(
        requested_bytes=allocated,
        allocated_bytes=allocated,
        active_bytes=allocated,
        inactive_split_bytes=0,
        reserved_bytes=reserved,
        peak_allocated_bytes=allocated if peak is None else peak,
        peak_reserved_bytes=reserved,
    )


def edge(
    name: PhaseName,
    at_ns: int,
    *,
    torch: TorchMemory | None = None,
    process: int | None = None,
    device: int | None = None,
    reason: str | None = None,
    trial: int | None = None,
    gpu: GpuState | None = None,
) -> PhaseEdge:
    reading = MemoryReading(at_ns=at_ns, process_bytes=process, device_bytes=device, reason=reason, gpu=gpu)
    return PhaseEdge(phase=Phase(name=name, at_ns=at_ns, trial=trial, torch=torch), reading=reading)


def sample(
    at_ns: int, *, process: int | None = None, device: int | None = None, gpu: GpuState | None = None
) -> MemoryReading:
    return MemoryReading(at_ns=at_ns, process_bytes=process, device_bytes=device, gpu=gpu)


def make_cell(precision: str = "fp16", **fields: Any) -> CellRecord:
    defaults: dict[str, Any] = {
        "label": precision.upper(),
        "bits_per_weight": 16.0,
        "outcome": DONE,
        "job": make_job(precision),
        "ready": make_ready(),
        "loaded": make_loaded(),
        "trials": [make_trial()],
    }
    return CellRecord(precision=precision, **(defaults | fields))


def make_run(
    *cells: CellRecord,
    jobs: list[Job] | None = None,
    gpu_reason: str | None = None,
    peaks: PeaksRecord | None = None,
) -> Run:
    """A run of these cells. Its plan has their jobs, unless `jobs` are given."""
    found = [cell.job for cell in cells if cell.job]
    return Run(
        plan=RunPlan(
            command=["qbench-orchestrate"],
            options=Options(),
            jobs=found if jobs is None else jobs,
            skipped={},
        ),
        environment=Environment(
            qbench="0.1.0",
            commit=None,
            python="3.12.3",
            platform="Linux",
            cpu="a CPU",
            cpu_count=2,
            memory_bytes=2**34,
            gpus=[] if gpu_reason else [H100],
            gpu_reason=gpu_reason,
        ),
        cells=list(cells),
        peaks=peaks,
    )


# Cells as measured on an H100

QWEN_7B = ForwardCosts(
    step_weight_bytes=14_141_000_000,
    kv_bytes_per_token=57_344,
    linear_parameters=6_525_288_448,
    head_parameters=544_997_376,
    attention_width=100_352,
)
"""Qwen2.5-7B as FP16: 28 layers of 28 query heads and 4 key-value heads of 128."""
QWEN_HALF_B = ForwardCosts(
    step_weight_bytes=988_000_000,
    kv_bytes_per_token=12_288,
    linear_parameters=357_826_560,
    head_parameters=136_134_656,
    attention_width=21_504,
)
H100_PEAKS = PeaksRecord(
    outcome=Peaks(
        read_bytes_per_s=2.93e12,
        copy_bytes_per_s=3.01e12,
        matrix_flop_per_s={"float16": 700e12},
        measured_s=2.0,
    ),
    wall_s=9.0,
)


def h100_cell(
    precision: str = "fp16",
    decode: DecodeMode = "graph",
    *,
    tok_s: float,
    busy_ms: float | None = None,
    launches: int = 1256,
    weight_bytes: int | None = None,
    costs: ForwardCosts | None = QWEN_7B,
    top: tuple[str, float] | None = None,
    workload: dict[str, Any] | None = None,
    **fields: Any,
) -> CellRecord:
    """One trial of 64 + 128 tokens at `tok_s`, and a profile of 16 steps if `busy_ms` per step is given.

    `top` is the name of the longest-running kernel, and its share of the busy time.
    """
    shape = {"prompts": ["one"], "new_tokens": 128, "decode": decode, **(workload or {})}
    batch = shape.get("batch_size", 1)
    steps = 127
    trial = make_trial(
        batch_size=batch,
        prompt_tokens=64,
        new_tokens=128,
        decode_s=steps * batch / tok_s,
        token_s=[batch / tok_s] * steps,
        token_ids=list(range(128)),
    )
    if costs is not None and weight_bytes is not None:
        costs = msgspec.structs.replace(costs, step_weight_bytes=weight_bytes)
    defaults: dict[str, Any] = {
        "job": make_job(precision, workload=Workload(**shape)),
        "loaded": make_loaded(costs=costs),
        "trials": [trial],
        "profile": None if busy_ms is None else make_profile(busy_ms, launches, top),
    }
    return make_cell(precision, **(defaults | fields))


def make_profile(busy_ms: float, launches: int, top: tuple[str, float] | None) -> Profile:
    """16 decode steps, with `busy_ms` and `launches` per step."""
    busy_s = 16 * busy_ms / 1e3
    kernels = [Kernel(name=top[0], count=16, total_s=top[1] * busy_s)] if top else []
    return Profile(decode=KernelTimes(steps=16, busy_s=busy_s, launches=16 * launches, kernels=kernels))
