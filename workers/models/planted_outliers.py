"""Outlier features planted in random weights, so that LLM.int8's slow path has its usual work.

Trained models of 6.7 billion parameters or more have a few feature channels, up to seven, that are the same
in every layer and whose values are up to 20 times as large as others for about 75 % of all tokens, at the
inputs of attention's projections and of the MLP's first layers (Dettmers et al. 2022, arXiv:2208.07339).
Random weights have none.

Here norms produce them. A norm's output has unit variance, so channels whose weight is 64 instead of 1 have
values with a median of about 43, of which 92 % exceed the threshold of 6. The layers that read them have
those columns divided by 64, so apart from rounding the model computes the same as without outliers. Hence
nothing grows from layer to layer, FP16 can represent everything, and no layer sees an outlier that wasn't
requested.
"""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SCALE = 64.0
"""A power of two, which rounds only the smallest FP16 numbers."""
NORMS = ("input_layernorm", "post_attention_layernorm")
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Linear layers that read a norm's output."""


def outlier_channels(count: int, hidden_size: int, seed: int) -> tuple[int, ...]:
    """`count` channels of the hidden state: the same for every layer, precision and device."""
    return tuple(sorted(random.Random(f"{seed}/outliers").sample(range(hidden_size), count)))


def plant_outliers(name: str, weight: "torch.Tensor", channels: Sequence[int]) -> None:
    """Scale the weight called `name` in place if it produces or reads these channels.

    A linear layer's weight has shape (outputs, inputs).
    """
    module, _, kind = name.rpartition(".")
    if not channels or kind != "weight":
        return
    if module.endswith(NORMS):
        weight[list(channels)] *= SCALE
    elif module.endswith(READERS):
        weight[:, list(channels)] /= SCALE
