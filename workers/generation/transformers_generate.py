"""transformers' own `generate()`, timed from inside, for comparison with our decode modes.

Its stopping criteria are called after every token, so one that never stops sees each token without adding a
synchronization.
"""

import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from workers.generation.device import Device
from workers.generation.prompts import Batch
from workers.generation.timed_generation import Generation, Limits, seconds_since
from workers.protocol.errors import Unsupported


def generate_with_transformers(
    model: PreTrainedModel,
    device: Device,
    batch: Batch,
    limits: Limits,
    between: Callable[[], None] = lambda: None,
) -> Generation:
    """Call `model.generate()` greedily, with prefill and decode timed separately; see `Generate`."""
    if batch.context is not None:
        raise Unsupported("generate() takes no context besides its prompt", "leave --depth out")
    ids = batch.ids.to(device.torch)
    mask = torch.ones_like(ids) if batch.mask is None else batch.mask.to(device.torch)
    watch = TokenWatch(device, limits, between)
    device.synchronize()
    watch.start_ns = time.monotonic_ns()
    made = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=limits.new_tokens,
        min_new_tokens=limits.new_tokens,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([watch]),
    )
    enqueue_s = seconds_since(watch.decode_start_ns)
    device.synchronize()
    decode_s = seconds_since(watch.decode_start_ns)
    token_ids = made[:, ids.shape[1] :].cpu()
    return Generation(watch.prefill_s, decode_s, watch.times.intervals_s(), enqueue_s, token_ids)


class TokenWatch(StoppingCriteria):
    """Marks each token. The first comes from prefill; decode starts after it. Stops at the limits."""

    def __init__(self, device: Device, limits: Limits, between: Callable[[], None]) -> None:
        self.device = device
        self.limits = limits
        self.between = between
        self.times = device.step_times()
        self.tokens = 0

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        if self.tokens == 0:
            self.device.synchronize()
            self.prefill_s = seconds_since(self.start_ns)
            self.between()
            self.decode_start_ns = time.monotonic_ns()
        self.times.mark()
        stop = self.limits.reached(self.tokens)
        self.tokens += 1
        return torch.full((input_ids.shape[0],), stop, device=input_ids.device)
