"""Random models with few, narrow layers, built in memory."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from workers.kernels.merged_linear import merged_linear


def small_model(architecture: str, **config: Any) -> PreTrainedModel:
    """A float32 model with two layers of four heads, unless `config` says otherwise."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **(sizes | config))).eval()


def concatenated(layers: list[Any]) -> torch.nn.Linear:
    """One linear layer with the concatenated outputs of `layers`."""
    return merged_linear(layers, torch.cat([layer.weight for layer in layers]))
