"""Merged layers of the same input: their outputs don't change, and one product computes them."""

import pytest
import torch
from small_models import concatenated, small_model
from transformers import PreTrainedModel

from workers.kernels.merged_linear import MergedLinear, MergedOutput, merge_linears, merged_setting


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    return small_model("qwen2")


def test_a_merged_model_gives_the_same_logits(model: PreTrainedModel) -> None:
    ids = torch.arange(12).view(3, 4)
    with torch.no_grad():
        expected = model(ids).logits
        assert merged_setting(model) == {}
        merge_linears(model, torch.nn.Linear, concatenated)
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    assert merged_setting(model) == {"joined": "q_proj+k_proj+v_proj, gate_proj+up_proj"}
    shapes = [(layer.in_features, layer.out_features) for layer in map(linear, merged_layers(model))]
    assert shapes == [(64, 64 + 32 + 32), (64, 96 + 96)] * 2
    kept = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert [name.split(".")[-1] for name in kept] == ["layer", "o_proj", "layer", "down_proj"] * 2 + [
        "lm_head"
    ]


def merged_layers(model: torch.nn.Module) -> list[MergedLinear]:
    return [module for module in model.modules() if isinstance(module, MergedLinear)]


def linear(layer: MergedLinear) -> torch.nn.Linear:
    assert isinstance(layer.layer, torch.nn.Linear)
    return layer.layer


def test_one_product_serves_all_outputs_and_none_is_kept() -> None:
    calls = []
    layer = torch.nn.Linear(8, 6)
    layer.register_forward_hook(lambda *_: calls.append(1))
    merged = MergedLinear(layer, [3, 2, 1])
    first, second, third = (MergedOutput(merged, index) for index in range(3))
    x, other = torch.randn(2, 8), torch.randn(2, 8)
    expected = layer(x), layer(other)
    calls.clear()
    assert torch.equal(torch.cat([first(x), second(x), third(x)], -1), expected[0])
    assert (len(calls), merged.input, merged.outputs) == (1, None, {})
    # In another order, with another input, and with one that was changed in place.
    assert torch.equal(third(x), expected[0][:, 5:])
    assert torch.equal(first(other), expected[1][:, :3])
    assert torch.equal(second(x), expected[0][:, 3:5])
    x.copy_(other)
    assert torch.equal(second(x), expected[1][:, 3:5])


def test_layers_with_different_biases_are_not_merged(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.self_attn.v_proj.bias = None
    merge_linears(model, torch.nn.Linear, concatenated)
    assert merged_setting(model) == {"joined": "gate_proj+up_proj"}


def test_layers_of_another_class_are_not_merged(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.mlp.up_proj = torch.nn.Identity()
    merge_linears(model, torch.nn.Linear, concatenated)
    assert merged_setting(model) == {"joined": "q_proj+k_proj+v_proj"}
    assert len(merged_layers(model)) == 2
