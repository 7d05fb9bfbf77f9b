"""Frames: what a worker tells its parent, one JSON object a line, in this order.

    once a worker   Phase("start") · [Phase("prepare")] · [Phase("build")] · Phase("context") · Ready ·
                    Phase("load") · Loaded · [Phase("cublas")]
    for each job    Phase("setup") · SetUp · Phase("warmup") · WarmedUp ·
                    for each trial Phase("prefill") · Phase("decode") · Trial ·
                    Phase("profile") · Profile · Phase("end") · Done

A job that fails ends in Failed instead of Done, at any place; Progress may stand anywhere. A worker that is
still of use after it says Waiting and reads another Job, which must differ in its workload alone.

The worker that measures the device's peaks says Phase("start") · Phase("context") · Ready · Peaks. One that
is only to prepare says Phase("start") · [Phase("prepare")] · Prepared.

Times are nanoseconds of CLOCK_MONOTONIC, which parent and worker share on one host, so that the
parent's memory samples and the worker's phases can be laid over each other.
"""

from typing import Literal

import msgspec

PhaseName = Literal[
    "start",
    "prepare",
    "build",
    "context",
    "load",
    "cublas",
    "setup",
    "warmup",
    "prefill",
    "decode",
    "profile",
    "end",
]

FailureKind = Literal[
    "missing-package", "out-of-memory", "unsupported", "bad-model", "timeout", "crashed", "error"
]


class TorchMemory(msgspec.Struct, frozen=True, kw_only=True):
    """The CUDA caching allocator at one synchronised instant, from `torch.cuda.memory_stats()`.

    All in bytes. allocated ≤ active ≤ reserved; requested ≤ allocated (blocks are rounded up).
    """

    requested_bytes: int
    allocated_bytes: int
    active_bytes: int
    inactive_split_bytes: int
    reserved_bytes: int
    peak_allocated_bytes: int
    """Highest `allocated` since the previous phase edge, where it was reset."""
    peak_reserved_bytes: int
    private_pool_bytes: int | None = None
    """Of `reserved`: pools of their own, as every CUDA graph has. None in records of before it was read."""
    expandable_bytes: int | None = None
    """Of `reserved`: mapped into segments that grow, see PYTORCH_ALLOC_CONF."""


class Frame(msgspec.Struct, frozen=True, kw_only=True, tag_field="frame", tag=str.lower):
    """Base of all frames: the JSON field `frame` tells them apart."""


class Phase(Frame, frozen=True, kw_only=True):
    """The worker enters a phase; everything before this instant belongs to the previous one.

    The device is synchronised, and the worker waits for a line on stdin (or its end) before it goes
    on, so that the parent reads NVML at the very instant `torch` was read.
    """

    name: PhaseName
    at_ns: int
    trial: int | None = None
    """Which timed trial a prefill or decode belongs to."""
    torch: TorchMemory | None = None
    """None before the CUDA context exists, and on a CPU."""


class Ready(Frame, frozen=True, kw_only=True):
    """Packages are imported and the device answers; nothing is loaded yet."""

    pid: int
    at_ns: int
    python: str
    versions: dict[str, str]
    """Distribution → version, of the packages that were really imported."""
    device: str
    device_name: str
    device_uuid: str | None = None
    """As NVML spells it, `GPU-…`; None on a CPU."""
    allocator_settings: str | None = None
    """PYTORCH_ALLOC_CONF or its older name, since it shifts every memory figure."""
    cuda_visible_devices: str | None = None
    """CUDA_VISIBLE_DEVICES as the worker has it: indices, UUIDs or MIG ids. `device` counts in its order."""
    cuda_device_order: str | None = None
    """CUDA_DEVICE_ORDER: by speed unless it says PCI_BUS_ID, which is how NVML counts."""


class Progress(Frame, frozen=True, kw_only=True):
    """A line for whoever watches; never evidence."""

    message: str
    done: int | None = None
    total: int | None = None


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """What quantized weights were calibrated with, and how long it took."""

    text: str
    """Name of the text's file."""
    text_sha256: str
    samples: int
    sample_tokens: int
    group_size: int
    took_s: float
    """All of it: search and packing, or packing alone where the findings were there."""

    def __str__(self) -> str:
        return (
            f"{self.text} (sha256 {self.text_sha256[:12]}), {self.samples} × {self.sample_tokens} tokens, "
            f"groups of {self.group_size}"
        )


class Prepared(Frame, frozen=True, kw_only=True):
    """Weights lie ready: the last word of a worker that was only to prepare them."""

    folder: str
    calibration: Calibration
    anew: bool
    """Whether this worker made them."""


class ForwardCosts(msgspec.Struct, frozen=True, kw_only=True):
    """What a forward pass must at least move and multiply, counted off the loaded modules."""

    step_weight_bytes: int
    """Weights with their scales that one decode step reads: all but input embeddings, of which it reads
    a row; an output head that is tied to them counts once."""
    kv_bytes_per_token: int
    """Keys and values of all layers for one position of one sequence."""
    linear_parameters: int
    """Weights, unquantized count, of the linear layers that every token passes: all but the head."""
    head_parameters: int
    """Weights of the output head, which multiplies one position per sequence."""
    attention_width: int
    """Query heads × head dimension, summed over the layers."""


class Loaded(Frame, frozen=True, kw_only=True):
    """What is in memory after load, read off the modules themselves: the proof of what can run."""

    weight_bytes: dict[str, int]
    """Bytes of distinct parameter and buffer storage by dtype, e.g. {"int8": …, "float16": …}."""
    linear_classes: dict[str, int]
    """Class name of every linear layer, its weight's in brackets where that is a tensor subclass → how many;
    shows which kernels can run."""
    compute_dtype: str
    parameters: int
    """Elements of the unquantized architecture, tied weights once."""
    weight_kinds: dict[str, int] = {}
    """The same bytes by what they are for too, e.g. {"matrices int8": …, "scales float32": …}."""
    module_classes: dict[str, int] = {}
    """The same of every module without children."""
    unquantized_linears: dict[str, int] = {}
    """Plain linear layers beside quantized ones: name, with `*` for layer numbers → how many."""
    off_device: list[str] = []
    """Parameters and buffers that are not on the job's device."""
    settings: dict[str, str] = {}
    """What decides on kernels, in the libraries' words, e.g. {"llm_int8_threshold": "6.0"}."""
    costs: ForwardCosts | None = None
    """None in records of before they were counted."""


class SetUp(Frame, frozen=True, kw_only=True):
    """What the decode mode needed before its first token: shapes, compilation, capture."""

    setup_s: float
    """All of it, compilation included; part of no other figure."""
    compile_s: float | None = None
    """The first compiled step, Inductor's work and autotuning in it; None where nothing is compiled."""
    graph_breaks: int | None = None
    """Where torch.compile had to fall back to Python, in the whole step; None where nothing is compiled."""
    cache_tokens: int | None = None
    """Positions of the static KV cache; None where the cache grows."""


class WarmedUp(Frame, frozen=True, kw_only=True):
    """The untimed trials: how many it took until two in a row agreed."""

    trial_s: list[float]
    """Wall time of each, prefill and decode, in order."""
    settled: bool | None
    """Whether the last two agreed; None where there were not two."""


class Trial(Frame, frozen=True, kw_only=True):
    """One timed generation: a batch of prompts, prefill and decode timed apart.

    The wall spans lie between two device synchronisations. `token_s` has one entry per decode step,
    from CUDA events (on a CPU: the host clock) recorded without a synchronisation in the loop.
    """

    index: int
    batch_size: int
    prompt_tokens: int
    """Per sequence, padding included."""
    new_tokens: int
    """Per sequence; the first comes from prefill, the others from `new_tokens − 1` decode steps."""
    prefill_s: float
    decode_s: float
    token_s: list[float]
    enqueue_s: float
    """Host time spent issuing the decode steps; near `decode_s` means that the host set the pace."""
    token_ids: list[int]
    """What the first sequence of the batch was given."""
    cut_short: bool = False
    """The budget ended this trial before all its tokens were made."""
    kv_bytes: int | None = None
    """Keys and values that the cache's tensors held at the end; None where the cache isn't ours to see."""


class Kernel(msgspec.Struct, frozen=True, kw_only=True):
    """All runs of one GPU kernel, or one kind of copy, in a trace."""

    name: str
    count: int
    total_s: float


class KernelTimes(msgspec.Struct, frozen=True, kw_only=True):
    """What the GPU did in `steps` decode steps, or in that many prefills."""

    steps: int
    busy_s: float
    """Time in which at least one kernel ran: the union of their intervals, over all steps."""
    launches: int
    """Kernels and copies that ran, over all steps."""
    kernels: list[Kernel]
    """Those that took longest, longest first."""


class Profile(Frame, frozen=True, kw_only=True):
    """A pass under the profiler, which slows the host: kernel times hold, wall times don't."""

    prefill: KernelTimes | None = None
    decode: KernelTimes | None = None
    reason: str | None = None
    """Why there are no kernel times."""


class Peaks(Frame, frozen=True, kw_only=True):
    """What this device reached when nothing but moving or multiplying was asked of it."""

    read_bytes_per_s: float
    """Reading memory far larger than any cache, as a decode step reads weights."""
    copy_bytes_per_s: float
    """Reading and writing, both counted."""
    matrix_flop_per_s: dict[str, float]
    """Torch dtype → multiplications and additions of a large square matrix product."""
    missing: dict[str, str] = {}
    """Torch dtype → why there is no rate of it."""
    measured_s: float
    """What the measurements took, imports apart."""


class Done(Frame, frozen=True, kw_only=True):
    """The worker measured what it was asked for, or what its budget let it."""

    at_ns: int
    trials_planned: int
    trials_measured: int
    sample_text: str | None
    """How the answer to the first prompt begins; None for random weights."""


class Failed(Frame, frozen=True, kw_only=True):
    """Why there is no figure. A failure is a row of the table, never a lost run."""

    kind: FailureKind
    message: str
    hint: str | None = None
    traceback: str | None = None


class Waiting(Frame, frozen=True, kw_only=True):
    """The model is still loaded and the device sound: another Job can follow, or the end of stdin."""


AnyFrame = (
    Phase
    | Ready
    | Progress
    | Prepared
    | Loaded
    | SetUp
    | WarmedUp
    | Trial
    | Profile
    | Peaks
    | Done
    | Failed
    | Waiting
)
