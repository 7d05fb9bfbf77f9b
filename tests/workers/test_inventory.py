"""Stored weights are counted to the byte, however deeply their tensors are wrapped."""

import torch
from torchao.quantization import Int4TilePackedTo4dTensor, Int4WeightOnlyConfig, Int8WeightOnlyConfig
from transformers import BitsAndBytesConfig, LlamaConfig, PreTrainedModel, TorchAoConfig

from workers.generation.device import Device
from workers.harness.inventory import take_inventory
from workers.models.random_model import build_random_model
from workers.protocol.backend import LoadedModel

LINEAR_PARAMETERS = 2 * (4 * 128 * 128 + 3 * 128 * 256)
INVERSE_FREQUENCIES = 2 * 4 * 16
REST = 2 * (2 * 512 * 128 + 5 * 128)
"""Bytes of embeddings, head and norms at 16 bits."""


def tiny_model(dtype: torch.dtype, **options: object) -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
    )
    return build_random_model(config, "cpu", dtype, 0, **options)


def tile_packed(weight: torch.Tensor) -> Int4TilePackedTo4dTensor:
    """A weight in the format of `int4-wo` on a GPU, with its shapes but not its values."""
    rows, columns = weight.shape
    padded = -(-columns // 1024) * 1024
    packed = torch.zeros(rows // 8, padded // 128, 32, 4, dtype=torch.int32)
    scales = torch.zeros(padded // 128, rows, 2, dtype=torch.bfloat16)
    return Int4TilePackedTo4dTensor(packed, scales, [1, 128], weight.shape)


def test_scales_of_scales_are_counted() -> None:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = tiny_model(torch.float16, quantization_config=quantization)
    loaded = take_inventory(LoadedModel(model, None), Device("cpu"))
    blocks = LINEAR_PARAMETERS // 64
    layers = 14
    # Per layer: a codebook of 16 values, an offset, and a codebook of 256 values for the quantized scales.
    tables = layers * 4 * (16 + 1) + layers * 4 * 256
    of_scales = 4 * 2 * (4 * 1 + 3 * 2)
    assert loaded.weight_bytes["uint8"] == LINEAR_PARAMETERS // 2 + blocks
    assert loaded.weight_bytes["float32"] == tables + of_scales + INVERSE_FREQUENCIES
    assert loaded.weight_bytes["float16"] == REST
    assert loaded.settings["bnb_4bit_use_double_quant"] == "True"


def test_padding_of_a_packed_layer_is_stored_but_not_read() -> None:
    model = tiny_model(torch.bfloat16)
    for layer in model.model.layers:
        up = layer.mlp.up_proj
        up.weight = torch.nn.Parameter(tile_packed(up.weight), requires_grad=False)
    loaded = take_inventory(LoadedModel(model, None), Device("cpu"))
    assert loaded.weight_bytes["int32"] == 2 * 256 * 1024 // 2
    assert (
        loaded.weight_bytes["bfloat16"]
        == REST + 2 * (LINEAR_PARAMETERS - 2 * 128 * 256) + 2 * 256 * 8 * 2 * 2
    )
    assert loaded.linear_classes == {"Linear": 13, "Linear[Int4TilePackedTo4dTensor]": 2}
    assert sum(loaded.unquantized_linears.values()) == 13
    assert "model.layers.*.mlp.up_proj" not in loaded.unquantized_linears
    assert loaded.unquantized_linears["model.layers.*.mlp.down_proj"] == 2
    assert loaded.costs
    embeddings = 2 * 512 * 128  # a step reads one row, since the head is a separate matrix
    padded = 2 * (256 * 1024 // 2 + 256 * 8 * 2 * 2)
    padding = padded * 7 // 8  # only 128 of 1024 inputs are real
    assert loaded.costs.step_weight_bytes == sum(loaded.weight_bytes.values()) - embeddings - padding


def test_a_formats_own_settings_are_recorded() -> None:
    model = tiny_model(torch.bfloat16)
    config = Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
    model.config.quantization_config = TorchAoConfig(config)
    settings = take_inventory(LoadedModel(model, None), Device("cpu")).settings
    expected = {
        "quant_method": "torchao",
        "quant_type": "Int4WeightOnlyConfig",
        "group_size": "128",
        "int4_packing_format": "tile_packed_to_4d",
        "int4_choose_qparams_algorithm": "tinygemm",
    }
    assert expected.items() <= settings.items()
    model.config.quantization_config = TorchAoConfig(Int8WeightOnlyConfig())
    settings = take_inventory(LoadedModel(model, None), Device("cpu")).settings
    assert settings["granularity"] == "PerRow(dim=-1)"
    assert "group_size" not in settings  # it is unset
