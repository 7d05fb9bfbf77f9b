"""One decode step on a growing cache, and one on a static cache that can be compiled and recorded."""

import time
from collections.abc import Callable
from typing import Protocol

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from schemas.frames import SetUp
from workers.generation.device import Device
from workers.generation.prompts import Batch
from workers.generation.static_cache import StepState

Step = Callable[[], None]


class CompiledStep(Protocol):
    compile_s: float
    graph_breaks: int

    def __call__(self) -> None: ...


class EagerStepper:
    """Forward passes with a growing cache. The positions and masks of all steps are made in advance."""

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
    """A step on tensors at fixed addresses, so that it can be recorded once and replayed."""

    def __init__(self, model: PreTrainedModel, state: StepState, new_tokens: int, device: Device) -> None:
        self.model = model
        self.state = state
        self.new_tokens = new_tokens
        self.device = device
        self.replay: Step = self._step

    def record(
        self,
        batch: Batch,
        learn: Callable[[Step], None] | None = None,
        compile_step: Callable[[Step], CompiledStep] | None = None,
    ) -> SetUp:
        """Compile the step if asked to, and record it as a CUDA graph if there is CUDA.

        `learn` receives the step before it is compiled, to see the arguments of separately compiled layers.
        """
        start_ns = time.monotonic_ns()
        self._begin_and_prefill(batch)
        if learn:
            learn(self._step)
            self._begin_and_prefill(batch)
        compiled = compile_step(self._step) if compile_step else None
        self._begin_and_prefill(batch)
        self.replay = self.device.replayable(compiled or self._step, compiled=compiled is not None)
        return SetUp(
            setup_s=(time.monotonic_ns() - start_ns) / 1e9,
            compile_s=compiled and compiled.compile_s,
            graph_breaks=compiled and compiled.graph_breaks,
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

    def _begin_and_prefill(self, batch: Batch) -> None:
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
    """Run `ids` through the model and pick the most likely next token of each row: shape (batch, 1)."""
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
    """Size of all layers' key and value tensors."""
    tensors = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def positions_and_mask(
    batch: Batch, new_tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Position of every token, prompt and answer, and a mask of the same shape (batch, all tokens) if padded.

    A row's positions don't count its padding.
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
    """Put the batch's context into `cache`, as an earlier turn of a conversation would have."""
    next_tokens(model, batch.context.to(positions.device), positions[:, : batch.depth], None, cache)
