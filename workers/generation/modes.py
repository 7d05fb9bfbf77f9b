"""Decode modes: four ways to issue the steps of one model, all giving the same greedy tokens.

- eager: the model's forward with a growing cache, as in `generate()` but without its other work. Python
  launches every kernel, so on a fast GPU the host sets the pace.
- graph: a static cache, and one CUDA graph for a whole step: forward, argmax, position. Apart from attention
  over that cache the kernels are the same, without the host; what remains is the GPU's own time.
- compile: the same step compiled by torch.compile, which fuses kernels, and then recorded as a CUDA graph.
- generate: transformers' `generate()` itself, which is what its users get.

The static cache is as small as the workload allows, because attention reads all of it at every step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType

import torch

from schemas.frames import SetUp
from schemas.job import DecodeMode
from workers.generation.device import Device
from workers.generation.prompts import Batch
from workers.generation.static_cache import StepState, grouped_attention_in
from workers.generation.steppers import EagerStepper, StaticStepper
from workers.generation.timed_generation import Generate, generate_stepwise
from workers.generation.transformers_generate import generate_with_transformers
from workers.protocol.backend import LoadedModel
from workers.protocol.errors import Unsupported

TESTED_TORCH = "2.11.0 and 2.13.0"
"""Versions whose private parts `compile` is known to work with."""


@contextmanager
def set_up_generation(
    mode: DecodeMode, loaded: LoadedModel, batches: list[Batch], new_tokens: int, device: Device
) -> Iterator[tuple[Generate, SetUp]]:
    """A function that generates from `batches` in this mode, usable within the context, and its setup's cost.

    Raises `Unsupported` if the precision, the device or torch can't do it.
    """
    model = loaded.model
    if mode == "generate":
        yield partial(generate_with_transformers, model, device), SetUp(setup_s=0.0)
    elif mode == "eager":
        yield partial(generate_stepwise, EagerStepper(model, new_tokens, device), device), SetUp(setup_s=0.0)
    else:
        with grouped_attention_in(model) as grouped:
            state = StepState(model, batches, new_tokens, grouped)
            stepper = StaticStepper(model, state, new_tokens, device)
            with _recorded(mode, stepper, loaded, batches[0]) as setup:
                yield partial(generate_stepwise, stepper, device), setup


@contextmanager
def _recorded(mode: DecodeMode, stepper: StaticStepper, loaded: LoadedModel, batch: Batch) -> Iterator[SetUp]:
    if mode == "graph":
        yield stepper.record(batch)
        return
    with _compile_mode().compiled(stepper, loaded, batch) as setup:
        yield setup


def _compile_mode() -> ModuleType:
    """The module of the mode `compile`, the only one that needs private parts of torch."""
    try:
        from workers.generation import compile_mode
    except (ImportError, AttributeError) as error:
        raise Unsupported(
            f"torch {torch.__version__} lacks a private part that compile uses: {error}"
            f" (tested with torch {TESTED_TORCH})",
            "leave compile out of --decode, or install a tested version of torch",
        ) from error
    return compile_mode
