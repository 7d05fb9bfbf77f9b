"""Outlier features planted in random weights, so that LLM.int8's slow path gets the work it is there for.

Trained models of 6.7 billion parameters or more have a few feature channels, up to seven, that are the same
in every layer and hold values up to 20 times as large as others for about 75 % of all tokens, at the inputs
of attention's projections and of the MLP's first layers (Dettmers et al. 2022, arXiv:2208.07339). Random
weights have none of that kind.

Here norms make them. A norm's output has unit variance, so channels whose weight is 64 instead of 1 hold
values with a median of about 43, of which 92 % pass the threshold of 6. The layers that read them have those
columns divided by 64: what the model computes stays, but for rounding, what it was without outliers. So
nothing grows from layer to layer, FP16 can hold it all, and no layer sees an outlier that wasn't asked for.
"""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SCALE = 64.0
"""A power of two, which rounds nothing but the smallest of FP16's numbers."""
NORMS = ("input_layernorm", "post_attention_layernorm")
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Linear layers whose input is a norm's output."""


def outlier_channels(count: int, hidden_size: int, seed: int) -> tuple[int, ...]:
    """`count` channels of the hidden state: the same for every layer, precision and device."""
    return tuple(sorted(random.Random(f"{seed}/outliers").sample(range(hidden_size), count)))


def plant_outliers(name: str, weight: "torch.Tensor", channels: Sequence[int]) -> None:
    """Change the weight called `name` in place, where it is one that makes or reads these channels.

    A linear layer's shape is (outputs, inputs).
    """
    module, _, kind = name.rpartition(".")
    if not channels or kind != "weight":
        return
    if module.endswith(NORMS):
        weight[list(channels)] *= SCALE
    elif module.endswith(READERS):
        weight[:, list(channels)] /= SCALE
