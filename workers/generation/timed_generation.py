"""Greedy generation with prefill and decode timed separately.

Prefill reads the whole prompt at once and is compute-bound; decode generates one token per step, reads every
weight for it, and is bound by memory bandwidth unless the host can't issue kernels fast enough. A single
figure for both would describe neither.

End of sequence is ignored: every trial generates exactly as many tokens as requested.
"""

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from workers.generation.device import Device
from workers.generation.prompts import Batch


class Generation(NamedTuple):
    """Tokens and their times. The device is synchronized at both ends of the wall spans."""

    prefill_s: float
    decode_s: float
    token_s: list[float]
    enqueue_s: float
    token_ids: torch.Tensor
    """Shape (batch, new tokens), on the CPU."""
    kv_bytes: int | None = None
    """Size of the cache's tensors at the end."""


class Limits(NamedTuple):
    """When to stop: after `new_tokens` per row, or once `deadline_ns` (monotonic) has passed.

    At least `min_steps` decode steps are made even after the deadline.
    """

    new_tokens: int
    deadline_ns: int | None = None
    min_steps: int = 1

    def reached(self, step: int) -> bool:
        """Whether to stop before decode step `step`, counted from 0."""
        if step >= self.new_tokens - 1:
            return True
        late = self.deadline_ns is not None and time.monotonic_ns() > self.deadline_ns
        return late and step >= self.min_steps


class Generate(Protocol):
    """Generates from a batch. `between` is called between prefill and decode, outside both spans."""

    def __call__(
        self, batch: Batch, limits: Limits, between: Callable[[], None] = lambda: None
    ) -> Generation: ...


class Stepper(Protocol):
    """A model driven step by step; each call issues work without waiting for it."""

    def begin(self, batch: Batch) -> None:
        """Forget the previous trial, and move inputs and context to the model's device."""

    def prefill(self) -> None:
        """Process the prompts and pick each row's first token."""

    def step(self) -> None:
        """Pick each row's next token from its previous one."""

    def token_ids(self) -> torch.Tensor:
        """All tokens picked since `begin`, shape (batch, tokens)."""

    def kv_bytes(self) -> int:
        """Size of the cache's tensors."""


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
    """Seconds of host time since `start_ns`, a reading of the monotonic clock."""
    return (time.monotonic_ns() - start_ns) / 1e9
