"""How decode steps are issued: four ways through one model, to the same greedy tokens.

- eager: the model's forward with a cache that grows, as `generate()` does it without what else that does.
  Every kernel is launched from Python, so on a fast GPU the host sets the pace.
- graph: a cache of fixed size, and one CUDA graph for a whole step: forward, argmax, position. But for
  attention over that cache the same kernels, without the host; what remains is the GPU's own time.
- compile: the same step through torch.compile first, which fuses kernels, then as a CUDA graph too.
- generate: transformers' `generate()` itself, for what its users get.

The static cache is as small as the workload allows, since attention reads all of it at every step.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from schemas.frames import SetUp
from schemas.job import DecodeMode
from workers.generation.compilation import Compile, CompiledStep, compiler, forget_compiled
from workers.generation.device import Device
from workers.generation.opaque import opaque
from workers.generation.prompts import Batch
from workers.generation.repeated_layers import Learn, repeated_layers
from workers.generation.static_cache import StepState, grouped_attention_in
from workers.generation.timing import Generate, generate_stepwise
from workers.generation.transformers_generate import generate_with_transformers
from workers.protocol.backend import LoadedModel


@contextmanager
def decoding(
    mode: DecodeMode, loaded: LoadedModel, batches: list[Batch], new_tokens: int, device: Device
) -> Iterator[tuple[Generate, SetUp]]:
    """Ready to generate from `batches` in this mode, for as long as a `with`; see `SetUp` for what it took.

    Raises `Unsupported` where the precision or the device can't do it.
    """
    model = loaded.model
    if mode == "generate":
        yield partial(generate_with_transformers, model, device), SetUp(setup_s=0.0)
    elif mode == "eager":
        yield partial(generate_stepwise, EagerStepper(model, new_tokens, device), device), SetUp(setup_s=0.0)
    else:
        summed = batches[0].ids.shape[0] <= loaded.max_gemv_batch
        compiled = compiler(device, summed) if mode == "compile" else None
        with (
            grouped_attention_in(model) as grouped,
            opaque(model, loaded.opaque if compiled else ()),
            # Layers of other attention can share keys and values, and are compiled with the step.
            repeated_layers(model, compiled) if compiled and grouped else nullcontext() as learn,
        ):
            state = StepState(model, batches, new_tokens, grouped)
            stepper = StaticStepper(model, state, new_tokens, device)
            try:
                facts = stepper.record(batches[0], compiled, learn)
                yield partial(generate_stepwise, stepper, device), facts
            finally:
                forget_compiled()


class EagerStepper:
    """Forward passes with a growing cache. Positions and masks of all steps are made beforehand."""

    def __init__(self, model: PreTrainedModel, new_tokens: int, device: Device) -> None:
        self.model = model
        self.new_tokens = new_tokens
        self.device = device.torch

    def begin(self, batch: Batch) -> None:
        self.cache = DynamicCache(config=self.model.config)
        self.ids = batch.ids.to(self.device)
        self.positions, self.mask = positions_and_mask(batch, self.new_tokens, self.device)
        self.seen = batch.depth
        self.tokens: list[torch.Tensor] = []
        if batch.context is not None:
            fill_context(self.model, batch, self.cache, self.positions)

    def prefill(self) -> None:
        self._forward(self.ids)

    def step(self) -> None:
        self._forward(self.tokens[-1])

    def token_ids(self) -> torch.Tensor:
        return torch.cat(self.tokens, dim=1)

    def kv_bytes(self) -> int:
        return cache_bytes(self.cache)

    def _forward(self, ids: torch.Tensor) -> None:
        start, self.seen = self.seen, self.seen + ids.shape[1]
        positions = self.positions[:, start : self.seen]
        mask = None if self.mask is None else self.mask[:, : self.seen]
        self.tokens.append(next_tokens(self.model, ids, positions, mask, self.cache))


class StaticStepper:
    """A step on tensors that stay where they are, so that it can be recorded once and replayed."""

    def __init__(self, model: PreTrainedModel, state: StepState, new_tokens: int, device: Device) -> None:
        self.model = model
        self.state = state
        self.new_tokens = new_tokens
        self.device = device
        self.replay: Callable[[], None] = self._step

    def record(self, batch: Batch, compiled: Compile | None, learn: Learn | None) -> SetUp:
        """Compile the step where that is wanted, and record it as a CUDA graph where there is CUDA.

        Layers that are compiled by themselves `learn` what a step calls them with.
        """
        start_ns = time.monotonic_ns()
        self._prefill_anew(batch)
        if learn:
            learn(self._step)
            self._prefill_anew(batch)
        compiling = CompiledStep(self._step, self.device, compiled) if compiled else None
        self._prefill_anew(batch)
        self.replay = self.device.replayable(compiling or self._step, compiled=compiled is not None)
        return SetUp(
            setup_s=(time.monotonic_ns() - start_ns) / 1e9,
            compile_s=compiling and compiling.compile_s,
            graph_breaks=compiling and compiling.graph_breaks,
            cache_tokens=self.state.capacity,
        )

    def begin(self, batch: Batch) -> None:
        self.ids = batch.ids.to(self.device.torch)
        self.positions, self.mask = positions_and_mask(batch, self.new_tokens, self.device.torch)
        self.batch = batch
        self.state.reset(batch, self.mask)
        if batch.context is not None:
            fill_context(self.model, batch, self.state.cache, self.positions)

    def prefill(self) -> None:
        start, end = self.batch.depth, self.batch.prompt_end
        positions = self.positions[:, start:end]
        mask = None if self.mask is None else self.mask[:, :end]
        first = next_tokens(self.model, self.ids, positions, mask, self.state.cache)
        self.state.start(self.batch, first, self.positions[:, end : end + 1])

    def step(self) -> None:
        self.replay()

    def token_ids(self) -> torch.Tensor:
        return self.state.tokens[:, : int(self.state.made)]

    def kv_bytes(self) -> int:
        return cache_bytes(self.state.cache)

    def _prefill_anew(self, batch: Batch) -> None:
        self.begin(batch)
        self.prefill()

    def _step(self) -> None:
        state = self.state
        state.open_slot()
        state.advance(next_tokens(self.model, state.token, state.position, state.mask, state.cache))


def next_tokens(
    model: PreTrainedModel,
    ids: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor | None,
    cache: Cache,
) -> torch.Tensor:
    """Put `ids` through the model, and choose the likeliest token after each row: shape (batch, 1)."""
    logits = model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits
    return logits[:, -1:].argmax(-1)


def cache_bytes(cache: Cache) -> int:
    """Keys and values of all layers, as large as their tensors are."""
    tensors = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def positions_and_mask(
    batch: Batch, new_tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Position of every token to be, and a mask of the same shape (batch, all tokens) where rows are padded.

    A row's positions count its own tokens, padding left out.
    """
    rows, width = batch.ids.shape
    total = batch.depth + width + new_tokens
    if batch.mask is None:
        return torch.arange(total, device=device).expand(rows, total), None
    before = torch.ones(rows, batch.depth, dtype=batch.mask.dtype)
    after = torch.ones(rows, new_tokens, dtype=batch.mask.dtype)
    mask = torch.cat([before, batch.mask, after], dim=1).to(device)
    return (mask.cumsum(-1) - 1).clamp(min=0), mask


def fill_context(model: PreTrainedModel, batch: Batch, cache: Cache, positions: torch.Tensor) -> None:
    """Put the batch's context into `cache`, as an earlier turn of the talk would have."""
    next_tokens(model, batch.context.to(positions.device), positions[:, : batch.depth], None, cache)
