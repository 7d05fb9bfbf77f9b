"""Greedy generation through the model's forward, prefill and decode timed apart.

Prefill reads the whole prompt at once and is bound by arithmetic; decode makes one token a step, reads every
weight for it, and is bound by memory bandwidth, unless the host can't issue kernels that fast. One
figure for both would tell about neither.

End of sequence is ignored: every trial makes exactly as many tokens as were asked for.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel

from workers.device import Device
from workers.prompts import Batch


class Generation(NamedTuple):
    """Wall spans lie between two synchronisations of the device."""

    prefill_s: float
    decode_s: float
    token_s: list[float]
    enqueue_s: float
    token_ids: torch.Tensor
    """Shape (batch, new tokens), on the CPU."""


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    batch: Batch,
    new_tokens: int,
    device: Device,
    between: Callable[[], None] = lambda: None,
    deadline_ns: int | None = None,
    fewest_steps: int = 1,
) -> Generation:
    """Generate `new_tokens` per row, or fewer where `deadline_ns` (monotonic) passes.

    However late it is, `fewest_steps` decode steps are made.

    `between` is called after prefill and before decode, outside of both spans.
    """
    inputs = _Inputs(batch, new_tokens, device.torch)
    cache = DynamicCache(config=model.config)
    device.synchronize()
    start_ns = time.monotonic_ns()
    token = _step(model, batch.ids.to(device.torch), cache, *inputs.prefill())
    device.synchronize()
    prefill_s = (time.monotonic_ns() - start_ns) / 1e9
    between()

    tokens = [token]
    times = device.step_times()
    start_ns = time.monotonic_ns()
    times.mark()
    for step in range(new_tokens - 1):
        if deadline_ns is not None and step >= fewest_steps and time.monotonic_ns() > deadline_ns:
            break
        token = _step(model, token, cache, *inputs.decode(step))
        tokens.append(token)
        times.mark()
    enqueue_s = (time.monotonic_ns() - start_ns) / 1e9
    device.synchronize()
    decode_s = (time.monotonic_ns() - start_ns) / 1e9
    return Generation(prefill_s, decode_s, times.intervals_s(), enqueue_s, torch.cat(tokens, dim=1).cpu())


def _step(
    model: PreTrainedModel,
    ids: torch.Tensor,
    cache: DynamicCache,
    positions: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    logits = model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits
    return logits[:, -1:].argmax(-1)


class _Inputs:
    """Positions and masks of all steps, made beforehand so that a step only takes a view of them."""

    def __init__(self, batch: Batch, new_tokens: int, device: torch.device) -> None:
        rows, self.width = batch.ids.shape
        total = self.width + new_tokens
        self.mask = None
        self.positions = torch.arange(total, device=device).expand(rows, total)
        if batch.mask is not None:
            grown = torch.ones(rows, new_tokens, dtype=batch.mask.dtype)
            self.mask = torch.cat([batch.mask, grown], dim=1).to(device)
            self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)

    def prefill(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self._view(0, self.width)

    def decode(self, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self._view(self.width + step, self.width + step + 1)

    def _view(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.positions[:, start:end], None if self.mask is None else self.mask[:, :end]
