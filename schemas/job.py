"""The Job: everything a worker needs to know, sent to it as one line of JSON on stdin."""

from typing import Literal

import msgspec

DecodeMode = Literal["eager", "graph", "compile", "generate"]
"""How decode steps are issued; `workers/generation/modes.py` says what each measures."""

ModelKind = Literal["hub", "folder", "gguf", "random"]

RANDOM_WEIGHTS_WARNING = "random weights: no quality, and INT8 has no outliers"
PLANTED_OUTLIERS_WARNING = "random weights: no quality; {} outlier features were planted in the activations"


class ModelSource(msgspec.Struct, frozen=True, kw_only=True):
    """Where the weights come from.

    `location` is a Hub id, a folder, a GGUF file or the name of a random architecture, as `kind` says.
    """

    kind: ModelKind
    location: str
    name: str
    """Short name for titles and folders, e.g. `qwen2.5-0.5b-instruct`."""
    notice: str | None = None
    """One line that every output of the run repeats, e.g. that a fallback model was taken."""
    outliers: int = 0
    """Outlier features planted in random weights; see `workers/models/planted_outliers.py`."""

    @property
    def is_random(self) -> bool:
        return self.kind == "random"


class CalibrationText(msgspec.Struct, frozen=True, kw_only=True):
    """A text of the user's own, in place of ours, that weights are calibrated with."""

    path: str
    sha256: str
    """Of the file as it was when the run was laid out; results are kept by it."""


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """What is generated, and how: every batch of prompts once, greedily, exactly `new_tokens` each."""

    prompts: list[str]
    """Texts of the prompts; each is wrapped in the model's chat template where it has one."""
    prompt_tokens: int | None = None
    """Cut or repeat every prompt to exactly this many tokens; None keeps its natural length."""
    depth: int = 0
    """Tokens of context that lie in the KV cache, untimed, before the prompt."""
    new_tokens: int = 128
    batch_size: int = 1
    decode: DecodeMode = "eager"
    warmup: int = 1
    """Fewest untimed trials before the timed ones."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One precision on one workload: a cell. A worker may be given several, one after another."""

    precision: str
    model: ModelSource
    workload: Workload
    device: str
    """`cpu` or `cuda:N`, N as torch counts."""
    packages: list[str] = []
    """Distributions the worker's header names; `Ready` reports the version of each."""
    checkpoint: str | None = None
    """Folder or Hub id of ready quantized weights for this precision."""
    calibration: CalibrationText | None = None
    """None is our own text; of no concern to a precision that isn't calibrated."""
    seed: int = 0
    budget_s: float | None = None
    """Seconds the worker may spend from its start, preparation apart; it measures what fits."""
    round: int = 0
    """Counted from 0. In each round every precision runs once, in a fresh process."""
    aa_control: bool = msgspec.field(name="twin", default=False)
    """The baseline measured again in the same round: how much it differs from itself is noise."""
    cache_folder: str
    """Where prepared weights and recipes are kept between runs."""


def decode_job(line: bytes) -> Job:
    """Read a Job from one line of JSON. Raises `msgspec.ValidationError` naming the field."""
    return msgspec.json.decode(line, type=Job)
