"""Random models of few and narrow layers, built in memory."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from workers.kernels.merged_linear import merged_linear


def small_model(architecture: str, **config: Any) -> PreTrainedModel:
    """Two layers of four heads, or what `config` says instead, in float32."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **(sizes | config))).eval()


def side_by_side(layers: list[Any]) -> torch.nn.Linear:
    """A linear layer whose outputs are those of these, one after the other."""
    return merged_linear(layers, torch.cat([layer.weight for layer in layers]))
