"""Random models of few and narrow layers, built in memory."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


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
    width, biased = sum(layer.out_features for layer in layers), layers[0].bias is not None
    joined = torch.nn.Linear(layers[0].in_features, width, bias=biased)
    for name, parameter in joined.named_parameters():
        parameter.data = torch.cat([getattr(layer, name) for layer in layers])
    return joined
