"""The interface of a precision: how to load its model, and what to prepare once beforehand."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from schemas.job import Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Report = Callable[[str, int, int], None]
"""Reports progress: what is being done, how many steps are done, and how many there are."""


class LoadedModel(NamedTuple):
    """A model on its device in eval mode, and its tokenizer (None for random weights)."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase | None"
    settings: Mapping[str, str] = {}
    """Facts that decide which kernels run and aren't in the model's config."""
    opaque: tuple[type, ...] = ()
    """Classes of linear layers that torch.compile must not trace; see `workers/generation/opaque_linears.py`.
    """
    max_gemv_batch: int = 1
    """Largest batch whose products compile to reductions; see `workers/generation/compilation.py`."""


@dataclass(frozen=True)
class Backend:
    """How to load a model, and what to prepare or build once for it.

    `prepare` and `build` each run in a separate process, so that they leave nothing in the process whose
    memory is measured. `is_prepared` and `is_built` must be cheap: they are called before torch is imported.
    """

    load: Callable[[Job], LoadedModel]
    prepare: Callable[[Job, Report], None] | None = None
    """Converts, calibrates or packs the weights that `load` needs, into the job's cache folder."""
    is_prepared: Callable[[Job], bool] = lambda _: True
    build: Callable[[Job, Report], None] | None = None
    """Compiles kernels that are distributed as sources."""
    is_built: Callable[[Job], bool] = lambda _: True
    prepared_folder: Callable[[Job], Path] | None = None
    """Where `prepare` saves calibrated weights and a note on their calibration."""
