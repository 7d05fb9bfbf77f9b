"""Frames: what a worker tells its parent, one JSON object a line, in this order.

    Phase("start") · [Phase("prepare")] · Phase("context") · Ready · Phase("load") · Loaded ·
    Phase("warmup") · for each trial Phase("prefill") · Phase("decode") · Trial · Phase("end") · Done

Failed may take any place and is then the last; Progress may stand anywhere.

Times are nanoseconds of CLOCK_MONOTONIC, which parent and worker share on one host, so that the
parent's memory samples and the worker's phases can be laid over each other.
"""

from typing import Literal

import msgspec

PhaseName = Literal["start", "prepare", "context", "load", "warmup", "prefill", "decode", "end"]

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


class Progress(Frame, frozen=True, kw_only=True):
    """A line for whoever watches; never evidence."""

    message: str
    done: int | None = None
    total: int | None = None


class Loaded(Frame, frozen=True, kw_only=True):
    """What is in memory after load, read off the modules themselves."""

    weight_bytes: dict[str, int]
    """Bytes of distinct parameter and buffer storage by dtype, e.g. {"int8": …, "float16": …}."""
    linear_classes: dict[str, int]
    """Class name of every linear layer → how many; shows which kernels can run."""
    compute_dtype: str
    parameters: int
    """Elements of the unquantized architecture, tied weights once."""


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


AnyFrame = Phase | Ready | Progress | Loaded | Trial | Done | Failed
