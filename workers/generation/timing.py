"""Greedy generation, prefill and decode timed apart.

Prefill reads the whole prompt at once and is bound by arithmetic; decode makes one token a step, reads every
weight for it, and is bound by memory bandwidth, unless the host can't issue kernels that fast. One
figure for both would tell about neither.

End of sequence is ignored: every trial makes exactly as many tokens as were asked for.
"""

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from workers.generation.device import Device
from workers.generation.prompts import Batch


class Generation(NamedTuple):
    """Wall spans lie between two synchronisations of the device."""

    prefill_s: float
    decode_s: float
    token_s: list[float]
    enqueue_s: float
    token_ids: torch.Tensor
    """Shape (batch, new tokens), on the CPU."""
    kv_bytes: int | None = None
    """Of the cache's tensors at the end."""


class Limits(NamedTuple):
    """When to stop: after `new_tokens` per row, or where `deadline_ns` (monotonic) passes.

    However late it is, `fewest_steps` decode steps are made.
    """

    new_tokens: int
    deadline_ns: int | None = None
    fewest_steps: int = 1

    def reached(self, step: int) -> bool:
        """Whether to stop before decode step `step`, counted from 0."""
        if step >= self.new_tokens - 1:
            return True
        late = self.deadline_ns is not None and time.monotonic_ns() > self.deadline_ns
        return late and step >= self.fewest_steps


class Generate(Protocol):
    """Generate from a batch; `between` is called after prefill and before decode, outside of both spans."""

    def __call__(
        self, batch: Batch, limits: Limits, between: Callable[[], None] = lambda: None
    ) -> Generation: ...


class Stepper(Protocol):
    """A model that is made to generate step by step, each call issuing work without waiting for it."""

    def begin(self, batch: Batch) -> None:
        """Forget the trial before, and put inputs and context where the model is."""

    def prefill(self) -> None:
        """Process the prompts and choose each row's first token."""

    def step(self) -> None:
        """Choose each row's next token from the one before."""

    def token_ids(self) -> torch.Tensor:
        """All tokens chosen since `begin`, shape (batch, tokens)."""

    def kv_bytes(self) -> int:
        """What the cache's tensors hold."""


def generate_stepwise(
    stepper: Stepper,
    device: Device,
    batch: Batch,
    limits: Limits,
    between: Callable[[], None] = lambda: None,
) -> Generation:
    """Drive `stepper` through prefill and decode; see `Generate`."""
    stepper.begin(batch)
    device.synchronize()
    start_ns = time.monotonic_ns()
    stepper.prefill()
    device.synchronize()
    prefill_s = seconds_since(start_ns)
    between()

    times = device.step_times()
    step = 0
    start_ns = time.monotonic_ns()
    times.mark()
    while not limits.reached(step):
        stepper.step()
        times.mark()
        step += 1
    enqueue_s = seconds_since(start_ns)
    device.synchronize()
    decode_s = seconds_since(start_ns)
    tokens = stepper.token_ids().cpu()
    return Generation(prefill_s, decode_s, times.intervals_s(), enqueue_s, tokens, stepper.kv_bytes())


def seconds_since(start_ns: int) -> float:
    """Host time since `start_ns`, a reading of the monotonic clock."""
    return (time.monotonic_ns() - start_ns) / 1e9
