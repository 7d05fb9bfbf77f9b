"""Frames: messages from a worker to its parent, one JSON object per line, in this order.

    per worker      Phase("start") · [Phase("prepare")] · [Phase("build")] · Phase("context") · Ready ·
                    Phase("load") · Loaded · [Phase("cublas")]
    per job         Phase("setup") · SetUp · Phase("warmup") · WarmedUp ·
                    per trial Phase("prefill") · Phase("decode") · Trial ·
                    Phase("profile") · Profile · Phase("end") · Done

A job that fails ends with Failed instead of Done, at any point; Progress may come at any point. A worker that
can still be used sends Waiting and reads another Job, which may differ only in its workload.

The worker that measures the device's peaks sends Phase("start") · Phase("context") · Ready · Peaks. One that
only prepares weights sends Phase("start") · [Phase("prepare")] · Prepared.

Times are nanoseconds of CLOCK_MONOTONIC, which parent and worker share on one host, so the parent's memory
samples and the worker's phases have one time axis.
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
    """The CUDA caching allocator at one synchronized instant, from `torch.cuda.memory_stats()`.

    allocated ≤ active ≤ reserved; requested ≤ allocated, since block sizes are rounded up.
    """

    requested_bytes: int
    allocated_bytes: int
    active_bytes: int
    inactive_split_bytes: int
    reserved_bytes: int
    peak_allocated_bytes: int
    """Highest `allocated` since the previous phase edge, which reset it."""
    peak_reserved_bytes: int
    private_pool_bytes: int | None = None
    """Part of `reserved`: private pools, such as those of CUDA graphs. None in older records."""
    expandable_bytes: int | None = None
    """Part of `reserved`: in expandable segments, see PYTORCH_ALLOC_CONF."""


class Frame(msgspec.Struct, frozen=True, kw_only=True, tag_field="frame", tag=str.lower):
    """Base of all frames; the JSON field `frame` is the tag."""


class Phase(Frame, frozen=True, kw_only=True):
    """The worker enters a phase; everything up to this instant belongs to the previous one.

    The device is synchronized, and the worker waits for a line on stdin (or its end) before it continues, so
    the parent reads NVML at the same instant as `torch` was read.
    """

    name: PhaseName
    at_ns: int
    trial: int | None = None
    """Index of the timed trial that a prefill or decode belongs to."""
    torch: TorchMemory | None = None
    """None before the CUDA context exists, and on a CPU."""


class Ready(Frame, frozen=True, kw_only=True):
    """Packages are imported and the device responds; nothing is loaded yet."""

    pid: int
    at_ns: int
    python: str
    versions: dict[str, str]
    """Distribution → version, of the packages actually imported."""
    device: str
    device_name: str
    device_uuid: str | None = None
    """In NVML's form, `GPU-…`; None on a CPU."""
    allocator_settings: str | None = None
    """PYTORCH_ALLOC_CONF, or the variable's older name. It affects every memory figure."""
    cuda_visible_devices: str | None = None
    """The worker's CUDA_VISIBLE_DEVICES: indices, UUIDs or MIG ids. `device` is an index into it."""
    cuda_device_order: str | None = None
    """CUDA_DEVICE_ORDER: fastest first, unless it is PCI_BUS_ID, the order of NVML's indices."""


class Progress(Frame, frozen=True, kw_only=True):
    """A line to show while the worker runs; it is not recorded."""

    message: str
    done: int | None = None
    total: int | None = None


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """How quantized weights were calibrated, and how long that took."""

    text: str
    """The text's file name."""
    text_sha256: str
    samples: int
    sample_tokens: int
    group_size: int
    took_s: float
    """Search and packing, or packing alone if the search results were cached."""

    def __str__(self) -> str:
        return (
            f"{self.text} (sha256 {self.text_sha256[:12]}), {self.samples} × {self.sample_tokens} tokens, "
            f"groups of {self.group_size}"
        )


class Prepared(Frame, frozen=True, kw_only=True):
    """The weights are ready: the last frame of a worker that only prepares them."""

    folder: str
    calibration: Calibration
    anew: bool
    """Whether this worker made them; otherwise they were cached."""


class ForwardCosts(msgspec.Struct, frozen=True, kw_only=True):
    """The least a forward pass must read and multiply, counted from the loaded modules."""

    step_weight_bytes: int
    """Weights and scales that one decode step reads: all but the input embeddings, of which it reads one row.
    An output head tied to them counts once."""
    kv_bytes_per_token: int
    """Keys and values of all layers for one token of one sequence."""
    linear_parameters: int
    """Weights in the linear layers that every token passes through: all but the head. Counted as if
    unquantized."""
    head_parameters: int
    """Weights of the output head, which multiplies one position per sequence."""
    attention_width: int
    """Query heads × head dimension, summed over the layers."""


class Loaded(Frame, frozen=True, kw_only=True):
    """The contents of memory after loading, read from the modules: evidence of which kernels can run."""

    weight_bytes: dict[str, int]
    """Dtype → bytes of distinct parameter and buffer storage, e.g. {"int8": …, "float16": …}."""
    linear_classes: dict[str, int]
    """Class name of a linear layer, with its weight's in brackets if that is a tensor subclass → count. Shows
    which kernels can run."""
    compute_dtype: str
    parameters: int
    """Of the unquantized architecture; tied weights count once."""
    weight_kinds: dict[str, int] = {}
    """The same bytes by purpose and dtype, e.g. {"matrices int8": …, "scales float32": …}."""
    module_classes: dict[str, int] = {}
    """Class name of a module without children → count."""
    unquantized_linears: dict[str, int] = {}
    """Linear layers left unquantized in a quantized model: name, with `*` for layer numbers → count."""
    off_device: list[str] = []
    """Parameters and buffers that are not on the job's device."""
    settings: dict[str, str] = {}
    """Library settings that determine the kernels, e.g. {"llm_int8_threshold": "6.0"}."""
    costs: ForwardCosts | None = None
    """None in older records."""


class SetUp(Frame, frozen=True, kw_only=True):
    """What the decode mode needed before its first token: shapes, compilation, capture."""

    setup_s: float
    """Total, compilation included; not part of any other figure."""
    compile_s: float | None = None
    """The first compiled step, including Inductor and autotuning; None if nothing is compiled."""
    graph_breaks: int | None = None
    """How often torch.compile falls back to Python in a step; None if nothing is compiled."""
    cache_tokens: int | None = None
    """Length of the static KV cache; None for a growing one."""


class WarmedUp(Frame, frozen=True, kw_only=True):
    """The untimed trials, which are repeated until two in a row agree."""

    trial_s: list[float]
    """Wall time of each, prefill and decode together, in order."""
    settled: bool | None
    """Whether the last two agreed; None if there were fewer than two."""


class Trial(Frame, frozen=True, kw_only=True):
    """One timed generation of a batch of prompts, with prefill and decode timed separately.

    Wall times are measured between device synchronizations. `token_s` has one entry per decode step, from
    CUDA events (on a CPU, the host clock) recorded without synchronizing in the loop.
    """

    index: int
    batch_size: int
    prompt_tokens: int
    """Per sequence, padding included."""
    new_tokens: int
    """Per sequence: the first from prefill, the rest from `new_tokens − 1` decode steps."""
    prefill_s: float
    decode_s: float
    token_s: list[float]
    enqueue_s: float
    """Host time spent issuing the decode steps; if close to `decode_s`, decode is host-bound."""
    token_ids: list[int]
    """Tokens generated for the first sequence of the batch."""
    cut_short: bool = False
    """The budget ran out before all tokens were generated."""
    kv_bytes: int | None = None
    """Size of the KV cache's tensors at the end; None if the cache is not accessible."""


class Kernel(msgspec.Struct, frozen=True, kw_only=True):
    """All executions of one GPU kernel, or one kind of copy, in a trace."""

    name: str
    count: int
    total_s: float


class KernelTimes(msgspec.Struct, frozen=True, kw_only=True):
    """GPU activity in `steps` decode steps, or in that many prefills."""

    steps: int
    busy_s: float
    """Time in which at least one kernel ran, over all steps: the union of their intervals."""
    launches: int
    """Kernels and copies executed, over all steps."""
    kernels: list[Kernel]
    """Those with the longest total time, longest first."""


class Profile(Frame, frozen=True, kw_only=True):
    """A pass under the profiler. It slows the host, so kernel times are valid but wall times are not."""

    prefill: KernelTimes | None = None
    decode: KernelTimes | None = None
    reason: str | None = None
    """Why there are no kernel times, if there are none."""


class Peaks(Frame, frozen=True, kw_only=True):
    """The device's measured bandwidth and matrix rates."""

    read_bytes_per_s: float
    """For reads of memory far larger than any cache, which is how a decode step reads weights."""
    copy_bytes_per_s: float
    """Reads and writes both count."""
    matrix_flop_per_s: dict[str, float]
    """Torch dtype → rate of a large square matrix product, multiplications and additions both counted."""
    missing: dict[str, str] = {}
    """Torch dtype → why its rate was not measured."""
    measured_s: float
    """Duration of the measurements, without imports."""


class Done(Frame, frozen=True, kw_only=True):
    """The worker measured the whole job, or as much as its budget allowed."""

    at_ns: int
    trials_planned: int
    trials_measured: int
    sample_text: str | None
    """Beginning of the answer to the first prompt; None for random weights."""


class Failed(Frame, frozen=True, kw_only=True):
    """Why there are no figures. A failure is a row of the table; it does not end the run."""

    kind: FailureKind
    message: str
    hint: str | None = None
    traceback: str | None = None


class Waiting(Frame, frozen=True, kw_only=True):
    """The model is still loaded and the device usable: another Job may follow, or the end of stdin."""


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
