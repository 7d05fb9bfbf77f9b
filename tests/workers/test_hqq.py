"""HQQ's integers, scales and zero points, quantized while a model loads.

Without a GPU gemlite can't be imported, so plain linear layers replace its layers.
"""

from pathlib import Path

import pytest
import torch
from golden_text import Golden
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from worker_runs import cpu_job

from workers.generation.device import Device
from workers.harness.inventory import take_inventory
from workers.protocol.backend import LoadedModel
from workers.protocol.errors import Unsupported
from workers.quantization.hqq_model import HqqConfig, choose_group_size, load_hqq_model, quantize


def plain_layer(integers: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor) -> torch.nn.Module:
    """A linear layer with the dequantized weights."""
    rows, columns = integers.shape
    layer = torch.nn.Linear(columns, rows, bias=False, device="meta")
    grouped = integers.view(len(scales), -1).to(scales.dtype)
    layer.weight = torch.nn.Parameter(((grouped - zero_points) * scales).view(rows, columns), False)
    layer.group_size = integers.numel() // scales.numel()
    return layer


def loaded(folder: Path, cache: Path) -> LoadedModel:
    return load_hqq_model(cpu_job("hqq", folder, cache), plain_layer)


def test_zero_points_are_fitted_to_the_weights() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) ** 3  # heavy tails
    integers, scales, zero_points = quantize(weight, HqqConfig(plain_layer))
    assert integers.dtype == torch.uint8
    assert (int(integers.min()), int(integers.max())) == (0, 15)
    assert scales.shape == zero_points.shape == (2 * 64, 1)
    low, high = (bound.unsqueeze(1) for bound in weight.view(-1, 128).aminmax(dim=1))
    step = (high - low) / 15
    nearest = ((weight.view(-1, 128) - low) / step).round() * step + low
    error = (plain_layer(integers, scales, zero_points).weight - weight).abs().mean()
    assert error < 0.99 * (nearest.view_as(weight) - weight).abs().mean()


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_qwen2"])
def test_every_linear_layer_but_the_head_is_quantized(
    model: str, request: pytest.FixtureRequest, cache: Path
) -> None:
    folder = request.getfixturevalue(model)
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    hqq = loaded(folder, cache)
    layers = {name: each for name, each in hqq.model.named_modules() if hasattr(each, "group_size")}
    assert len(layers) == 14
    assert {layer.group_size for layer in layers.values()} == {128}
    for name, layer in layers.items():
        linear = whole.get_submodule(name)
        assert 0 < (layer.weight - linear.weight).norm() < 0.15 * linear.weight.norm()
        assert (layer.bias is None) == (linear.bias is None)
        if linear.bias is not None:
            assert torch.equal(layer.bias, linear.bias)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(hqq.model.get_parameter(name), whole.get_parameter(name))
    settings = take_inventory(hqq, Device("cpu")).settings
    assert {"nbits": "4", "group_size": "128", "axis": "1"}.items() <= settings.items()
    assert not hqq.model.training
    ids = AutoTokenizer.from_pretrained(folder)("The river is", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert hqq.model(ids).logits.isfinite().all()


def test_random_weights_are_quantized_as_they_are_drawn(
    cache: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AutoConfig.from_pretrained(tiny_llama)
    monkeypatch.setattr("workers.models.random_model.random_config", lambda _: config)
    model = load_hqq_model(cpu_job("hqq", "tiny", cache), plain_layer).model
    assert sum(hasattr(each, "group_size") for each in model.modules()) == 14
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_groups_are_as_large_as_the_widths_allow(golden: Golden) -> None:
    assert choose_group_size({3584, 18944}) == 128
    assert choose_group_size({576, 1536}) == 64
    assert choose_group_size({96}) == 32
    with pytest.raises(Unsupported, match=r"32.*\[100, 128\]") as refused:
        choose_group_size({128, 100})
    golden([str(refused.value), refused.value.hint or ""])
