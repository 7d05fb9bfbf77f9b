"""The Job: all of a worker's input, sent to it as one line of JSON on stdin."""

from typing import Literal

import msgspec

DecodeMode = Literal["eager", "graph", "compile", "generate"]
"""How decode steps are issued; `workers/generation/modes.py` explains what each mode measures."""

ModelKind = Literal["hub", "folder", "gguf", "random"]

RANDOM_WEIGHTS_WARNING = "random weights: no quality, and INT8 has no outliers"
PLANTED_OUTLIERS_WARNING = "random weights: no quality; {} outlier features were planted in the activations"


class ModelSource(msgspec.Struct, frozen=True, kw_only=True):
    """Where the weights come from.

    Depending on `kind`, `location` is a Hub id, a folder, a GGUF file or the name of a random architecture.
    """

    kind: ModelKind
    location: str
    name: str
    """Short name for titles and folders, e.g. `qwen2.5-0.5b-instruct`."""
    notice: str | None = None
    """A line that every output of the run repeats, e.g. that a fallback model was used."""
    outliers: int = 0
    """Outlier features planted in random weights; see `workers/models/planted_outliers.py`."""

    @property
    def is_random(self) -> bool:
        return self.kind == "random"


class CalibrationText(msgspec.Struct, frozen=True, kw_only=True):
    """A user's text to calibrate weights with, instead of the built-in one."""

    path: str
    sha256: str
    """Of the file when the run was planned; calibrated weights are cached by it."""


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """What to generate, and how: each batch of prompts once, greedily, exactly `new_tokens` per prompt."""

    prompts: list[str]
    """Each is wrapped in the model's chat template, if it has one."""
    prompt_tokens: int | None = None
    """Cut or repeat every prompt to exactly this many tokens; None keeps its natural length."""
    depth: int = 0
    """Tokens of context already in the KV cache before the prompt; filling it is not timed."""
    new_tokens: int = 128
    batch_size: int = 1
    decode: DecodeMode = "eager"
    warmup: int = 1
    """Minimum number of untimed trials before the timed ones."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A cell: one precision on one workload. A worker may be sent several, one after another."""

    precision: str
    model: ModelSource
    workload: Workload
    device: str
    """`cpu` or `cuda:N`, with torch's numbering."""
    packages: list[str] = []
    """Distributions named in the worker's header; `Ready` reports their versions."""
    checkpoint: str | None = None
    """Folder or Hub id of weights already quantized for this precision."""
    calibration: CalibrationText | None = None
    """None for the built-in text. Ignored by precisions that need no calibration."""
    seed: int = 0
    budget_s: float | None = None
    """Seconds from the worker's start, excluding preparation; it measures what fits in them."""
    round: int = 0
    """From 0. Every round runs each precision once, in a fresh process."""
    aa_control: bool = msgspec.field(name="twin", default=False)
    """The baseline measured again in the same round: how much it differs from itself is noise."""
    cache_folder: str
    """Where prepared weights and recipes are cached between runs."""


def decode_job(line: bytes) -> Job:
    """Decode a Job from one line of JSON. Raises `msgspec.ValidationError`, which names the field."""
    return msgspec.json.decode(line, type=Job)
