"""Small batches times 8-bit weights: how work is divided, which rows are routed here, and results."""

import math

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

from workers.kernels import eight_bit_product as eight_bit_kernel
from workers.kernels.eight_bit_product import eight_bit_product, plan, with_eight_bit_product
from workers.kernels.small_batch import MAX_ROWS, RESERVED_SHARED_BYTES, Gpu
from workers.protocol.backend import LoadedModel

H100 = Gpu(132, 228 << 10)
CONFIGS = [Int8WeightOnlyConfig, Float8WeightOnlyConfig]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("shape", "outputs", "routed"),
    [
        ((2, 1, 256), 64, True),
        ((MAX_ROWS, 1, 256), 64, True),
        ((MAX_ROWS + 1, 1, 256), 64, False),
        ((1, 1, 256), 64, True),
        ((1, 5, 256), 64, False),
        ((2, 1, 192), 64, False),
        ((2, 1, 256), 72, False),
    ],
)
def test_small_batches_are_routed_and_others_left_to_torchao(
    config: type, shape: tuple[int, ...], outputs: int, routed: bool, monkeypatch: pytest.MonkeyPatch
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
        assert seen == ([(math.prod(shape[:-1]), shape[-1])] if routed else [])
        seen.clear()
        torch.compile(layer, backend="aot_eager", dynamic=False)(x)
        assert bool(seen) == routed


def test_a_launch_is_planned_once_per_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    launched: list[list[object]] = []

    def counted(rows: int, blocks: int, gpu: Gpu) -> eight_bit_kernel.Launch:
        plans.append((rows, blocks))
        return plan(rows, blocks, gpu)

    monkeypatch.setattr(eight_bit_kernel, "plan", counted)
    monkeypatch.setattr(eight_bit_kernel, "gpu_limits", lambda _: H100)
    monkeypatch.setattr(
        eight_bit_kernel, "compile_kernel", lambda *_, **__: lambda args, **_: launched.append(args)
    )
    eight_bit_kernel.launcher.cache_clear()
    stored = {dtype: torch.zeros(32, 256, dtype=dtype) for dtype in (torch.int8, torch.float8_e4m3fn)}
    for dtype in (torch.int8, torch.int8, torch.float8_e4m3fn, torch.int8):
        eight_bit_product(torch.randn(2, 256).bfloat16(), stored[dtype], torch.ones(32))
    eight_bit_kernel.launcher.cache_clear()
    assert plans == [(2, 2), (2, 2)]  # one for each dtype, since each has its own kernel
    assert [(args[4], args[5]) for args in launched] == [(2, 32)] * 4


@pytest.mark.parametrize("config", CONFIGS)
def test_queries_keys_and_values_are_merged(config: type, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_few_rows_get_more_warps_if_blocks_would_wait(rows: int, blocks: int, warps: int) -> None:
    launch = plan(rows, blocks, H100)
    assert launch.warps == warps
    assert launch.shared_bytes + RESERVED_SHARED_BYTES <= H100.shared_bytes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(16, 128), (512, 3584), (3584, 3584), (18944, 896), (1008, 18944)])
@pytest.mark.parametrize("rows", [1, 2, 7, 9, 16, 19, MAX_ROWS])
def test_the_product_agrees_with_float64(dtype: torch.dtype, shape: tuple[int, int], rows: int) -> None:
    torch.manual_seed(0)
    outputs, inputs = shape
    weight = (torch.randn(shape, device="cuda") * 40).clamp(-127, 127).to(dtype)
    scales = torch.rand(outputs, device="cuda")
    x = torch.randn(rows, inputs, device="cuda").bfloat16()
    expected = x.double() @ weight.double().T * scales.double()
    found = eight_bit_product(x, weight, scales)
    assert (found.double() - expected).norm() / expected.norm() < 2**-8
    assert torch.equal(found, eight_bit_product(x, weight, scales))
