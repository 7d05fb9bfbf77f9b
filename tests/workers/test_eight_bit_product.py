"""Few rows times weights of 8 bits: how work is shared out, which rows come here, on a GPU the numbers."""

import math
from types import SimpleNamespace

import pytest
import torch
from small_models import small_model
from torchao.quantization import (
    Float8Tensor,
    Float8WeightOnlyConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    quantize_,
)

from workers.kernels.eight_bit_product import eight_bit_product, plan, with_eight_bit_product
from workers.kernels.small_batch import MOST_ROWS, RESERVED_SHARED_BYTES
from workers.protocol.backend import LoadedModel

H100 = SimpleNamespace(multi_processor_count=132, shared_memory_per_multiprocessor=228 << 10)
CONFIGS = [Int8WeightOnlyConfig, Float8WeightOnlyConfig]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("shape", "outputs", "comes"),
    [
        ((2, 1, 256), 64, True),
        ((MOST_ROWS, 1, 256), 64, True),
        ((MOST_ROWS + 1, 1, 256), 64, False),
        ((1, 1, 256), 64, True),
        ((1, 5, 256), 64, False),
        ((2, 1, 192), 64, False),
        ((2, 1, 256), 72, False),
    ],
)
def test_few_rows_come_here_and_others_go_to_torchao(
    config: type, shape: tuple[int, ...], outputs: int, comes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = torch.nn.Linear(shape[-1], outputs, dtype=torch.bfloat16)
    quantize_(layer, config())
    linear = torch.nn.functional.linear
    for kind in (Int8Tensor, Float8Tensor):
        functions = kind._TORCH_FN_TABLE[kind]
        monkeypatch.setitem(functions, linear, functions[linear])
    seen = []

    def product(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape)
        return ((x.float() @ weight.float().T) * scales).to(x.dtype)

    monkeypatch.setattr("workers.kernels.eight_bit_product.eight_bit_product", product)
    x = torch.randn(shape, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(x)
        with_eight_bit_product(LoadedModel(torch.nn.Module(), None))
        torch.testing.assert_close(layer(x), expected, rtol=0.02, atol=0.02)
        assert seen == ([(math.prod(shape[:-1]), shape[-1])] if comes else [])
        seen.clear()
        torch.compile(layer, backend="aot_eager", dynamic=False)(x)
        assert bool(seen) == comes


@pytest.mark.parametrize("config", CONFIGS)
def test_queries_keys_and_values_are_one_product(config: type, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = torch.nn.functional.linear
    for kind in (Int8Tensor, Float8Tensor):
        functions = kind._TORCH_FN_TABLE[kind]
        monkeypatch.setitem(functions, linear, functions[linear])
    model = small_model("qwen2").bfloat16()
    quantize_(model.model, config())
    ids = torch.arange(12).view(3, 4)
    with torch.no_grad():
        expected = model(ids).logits
        loaded = with_eight_bit_product(LoadedModel(model, None))
        assert torch.equal(model(ids).logits, expected)
    assert loaded.settings == {"small_batch": "eight_bit_product.cu", "joined": "q_proj+k_proj+v_proj"}


@pytest.mark.parametrize(
    ("rows", "blocks", "warps"), [(1, 864, 4), (1, 1184, 8), (8, 224, 4), (8, 1184, 8), (64, 1184, 4)]
)
def test_few_rows_have_more_warps_where_blocks_wait(rows: int, blocks: int, warps: int) -> None:
    launch = plan(rows, blocks, H100)
    assert launch.warps == warps
    assert launch.shared_bytes + RESERVED_SHARED_BYTES <= H100.shared_memory_per_multiprocessor


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(16, 128), (512, 3584), (3584, 3584), (18944, 896), (1008, 18944)])
@pytest.mark.parametrize("rows", [1, 2, 7, 9, 16, 19, MOST_ROWS])
def test_the_product_is_that_of_float64(dtype: torch.dtype, shape: tuple[int, int], rows: int) -> None:
    torch.manual_seed(0)
    outputs, inputs = shape
    weight = (torch.randn(shape, device="cuda") * 40).clamp(-127, 127).to(dtype)
    scales = torch.rand(outputs, device="cuda")
    x = torch.randn(rows, inputs, device="cuda").bfloat16()
    expected = x.double() @ weight.double().T * scales.double()
    found = eight_bit_product(x, weight, scales)
    assert (found.double() - expected).norm() / expected.norm() < 2**-8
    assert torch.equal(found, eight_bit_product(x, weight, scales))
