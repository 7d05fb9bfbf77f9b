"""Small batches times INT4 weights: how work is divided, which rows are routed here, and results."""

import math

import pytest
import torch
from golden_text import Golden
from torch._subclasses.fake_tensor import FakeTensorMode
from torchao.quantization import Int4TilePackedTo4dTensor

from workers.kernels import int4_product as int4_kernel
from workers.kernels.int4_product import int4_product, plan, with_int4_product
from workers.kernels.merged_linear import ATTENTION, MLP, merged_linear
from workers.kernels.small_batch import GROUP, MAX_BLOCK_ROWS, MAX_ROWS, Gpu
from workers.protocol.backend import LoadedModel

SHAPES = [(8, 128), (512, 3584), (3584, 3584), (18944, 3584), (3584, 18944), (4864, 896), (152064, 1024)]
NO_MODEL = LoadedModel(torch.nn.Module(), None)
H100 = Gpu(132, 228 << 10)
GPUS = [Gpu(40, 100 << 10), H100]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("rows", [1, 5, MAX_ROWS])
def test_a_launch_fits_a_gpu_and_has_no_idle_warps(shape: tuple[int, int], gpu: Gpu, rows: int) -> None:
    row_blocks, groups = shape[0] // 8, shape[1] // GROUP
    launch = plan(rows, row_blocks, groups, gpu)
    rounds = -(-groups // launch.warps)
    assert launch.rows <= MAX_BLOCK_ROWS
    assert launch.row_blocks <= row_blocks
    assert groups <= rounds * launch.warps < groups + rounds
    assert launch.warps * launch.blocks <= 16
    assert 1 <= launch.stages <= rounds
    assert (launch.shared_bytes + 1024) * launch.blocks <= gpu.shared_bytes


@pytest.mark.parametrize(
    ("rows", "outputs", "blocks"),
    [(1, 1152, 1), (1, 3584, 4), (1, 4608, 5), (1, 7168, 4), (1, 37888, 4), (8, 7168, 4), (8, 37888, 5)],
)
def test_thread_blocks_take_more_outputs_if_there_are_many(rows: int, outputs: int, blocks: int) -> None:
    assert plan(rows, outputs // 8, 28, H100).row_blocks == blocks


def weight(outputs: int, inputs: int, device: str = "cpu") -> Int4TilePackedTo4dTensor:
    """Random integers, scales and zero points, stored with inputs padded to a multiple of 1024."""
    groups = -(-inputs // 1024) * 1024 // GROUP
    packed = torch.randint(-(2**31), 2**31, (outputs // 8, groups, 32, 4), device=device).int()
    scale_and_zero = torch.rand(groups, outputs, 2, device=device).bfloat16() / 100
    shape = torch.Size([outputs, inputs])
    return Int4TilePackedTo4dTensor(packed, scale_and_zero, [1, GROUP], shape)


@pytest.mark.parametrize(
    ("shape", "routed"),
    [
        ((1, 1, 256), True),
        ((256,), True),
        ((MAX_ROWS, 1, 256), True),
        ((MAX_ROWS + 1, 1, 256), False),
        ((1, 2, 256), False),
    ],
)
def test_small_batches_are_routed_and_others_left_to_torchao(
    shape: tuple[int, ...], routed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = torch.nn.functional.linear
    functions = Int4TilePackedTo4dTensor._TORCH_FN_TABLE[Int4TilePackedTo4dTensor]
    monkeypatch.setitem(functions, linear, lambda *_: "torchao's")
    rows: list[torch.Size] = []

    def product(x: torch.Tensor, packed: torch.Tensor, scale_and_zero: torch.Tensor) -> torch.Tensor:
        rows.append(x.shape)
        return torch.ones(len(x), 16)

    monkeypatch.setattr("workers.kernels.int4_product.int4_product", product)
    with_int4_product(NO_MODEL)
    for bias in (None, torch.ones(16)):
        result = linear(torch.randn(shape).bfloat16(), weight(16, 256), bias)
        if routed:
            assert torch.equal(result, torch.full((*shape[:-1], 16), 1.0 if bias is None else 2.0))
        else:
            assert result == "torchao's"
    assert rows == [(math.prod(shape) // 256, 256)] * (2 if routed else 0)


def test_a_launch_is_planned_once_per_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    launched: list[dict[str, object]] = []

    def counted(*shape: int, gpu: Gpu) -> int4_kernel.Launch:
        plans.append(shape)
        return plan(*shape, gpu)

    monkeypatch.setattr(int4_kernel, "plan", lambda *args: counted(*args[:-1], gpu=args[-1]))
    monkeypatch.setattr(int4_kernel, "gpu_limits", lambda _: H100)
    monkeypatch.setattr(
        int4_kernel, "compile_kernel", lambda *_, **__: lambda **launch: launched.append(launch)
    )
    int4_kernel.launcher.cache_clear()
    stored = weight(32, 256)
    for rows in (1, 1, 3, 1, 3):
        int4_product(torch.randn(rows, 256).bfloat16(), stored.qdata, stored.scale_and_zero)
    int4_kernel.launcher.cache_clear()
    assert plans == [(1, 4, 2), (3, 4, 2)]
    assert [launch["args"][4] for launch in launched] == [1, 1, 3, 1, 3]
    assert all(
        launch["shared_mem"] == plan(launch["args"][4], 4, 2, H100).shared_bytes for launch in launched
    )


def test_without_nvrtc_torchao_multiplies_and_a_setting_says_so(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = Int4TilePackedTo4dTensor._TORCH_FN_TABLE[Int4TilePackedTo4dTensor]
    monkeypatch.setitem(functions, torch.nn.functional.linear, lambda *_: "torchao's")
    monkeypatch.delattr(torch.cuda, "_compile_kernel")
    monkeypatch.setattr(torch, "__version__", "2.14.1")
    model = parallel_layers(q_proj=32, k_proj=16, v_proj=8)
    loaded = with_int4_product(LoadedModel(model, None, {"group_size": "128"}))
    assert torch.nn.functional.linear(torch.randn(1, 256).bfloat16(), weight(16, 256)) == "torchao's"
    assert model.q_proj.out_features == 32
    assert loaded.settings.keys() == {"group_size", "small_batch"}
    golden(loaded.settings["small_batch"])


@pytest.mark.parametrize(("inputs", "dtype"), [(576, torch.bfloat16), (512, torch.float16)])
def test_unsupported_inputs_are_left_to_torchao(
    inputs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = Int4TilePackedTo4dTensor._TORCH_FN_TABLE[Int4TilePackedTo4dTensor]
    monkeypatch.setitem(functions, torch.nn.functional.linear, lambda *_: "torchao's")
    with_int4_product(NO_MODEL)
    row = torch.randn(1, inputs, dtype=dtype)
    assert torch.nn.functional.linear(row, weight(16, inputs)) == "torchao's"


def parallel_layers(**outputs: int) -> torch.nn.Module:
    """A module with layers of these names and numbers of outputs."""
    module = torch.nn.Module()
    for name, each in outputs.items():
        layer = torch.nn.Linear(256, each, dtype=torch.bfloat16)
        module.register_module(name, merged_linear([layer], weight(each, 256)))
    return module


@pytest.mark.parametrize(("names", "outputs"), [(ATTENTION, (32, 16, 8)), (MLP, (40, 16))])
def test_layers_of_the_same_input_are_merged(
    names: tuple[str, ...], outputs: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = Int4TilePackedTo4dTensor._TORCH_FN_TABLE[Int4TilePackedTo4dTensor]
    monkeypatch.setitem(functions, torch.nn.functional.linear, functions[torch.nn.functional.linear])
    model = parallel_layers(**dict(zip(names, outputs, strict=True)))
    separate = [getattr(model, name) for name in names]
    loaded = with_int4_product(LoadedModel(model, None, {"group_size": "128"}))
    assert loaded.settings["joined"] == "+".join(names)
    merged = getattr(model, names[0]).merged.layer
    assert (merged.in_features, merged.out_features) == (256, sum(outputs))
    assert torch.equal(merged.bias, torch.cat([layer.bias for layer in separate]))
    x = torch.randn(3, 256).bfloat16()
    assert torch.equal(
        exact(x, merged.weight), torch.cat([exact(x, layer.weight) for layer in separate], dim=1)
    )


def test_layers_with_padded_outputs_are_not_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = Int4TilePackedTo4dTensor._TORCH_FN_TABLE[Int4TilePackedTo4dTensor]
    monkeypatch.setitem(functions, torch.nn.functional.linear, functions[torch.nn.functional.linear])
    model = parallel_layers(q_proj=32, k_proj=16, v_proj=12)
    assert "joined" not in with_int4_product(LoadedModel(model, None)).settings
    assert model.q_proj.out_features == 32


def test_the_fake_implementation_gives_shape_and_dtype() -> None:
    with FakeTensorMode():
        packed, scale_and_zero = torch.empty(5, 8, 32, 4, dtype=torch.int32), torch.empty(8, 40, 2)
        y = int4_product(torch.empty(3, 256, dtype=torch.bfloat16), packed, scale_and_zero)
    assert y.shape == (3, 40)
    assert y.dtype == torch.bfloat16


def exact(x: torch.Tensor, stored: Int4TilePackedTo4dTensor) -> torch.Tensor:
    """The product in float64, of shape (rows, outputs)."""
    groups = x.shape[1] // GROUP
    words = stored.qdata[:, :groups].unsqueeze(-1)
    integers = (words >> torch.arange(0, 32, 4, device=x.device).int()) & 15
    # Blocks of outputs, groups, outputs; then the parts of an input's index in its group: those given by lane
    # and word, and its last, fifth and fourth bit.
    integers = integers.view(-1, groups, 8, 4, 4, 2, 2, 2).permute(0, 2, 1, 4, 6, 7, 3, 5)
    scales, zeros = stored.scale_and_zero[:groups].double().transpose(0, 1).unsqueeze(-2).unbind(-1)
    weights = (integers.reshape(-1, groups, GROUP).double() - 8) * scales + zeros
    return x.double() @ weights.view(-1, groups * GROUP).T


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (24, 1152), (1000, 3712), (256, 28672)])
@pytest.mark.parametrize("rows", [1, 2, 7, 9, 16, 19, MAX_ROWS])
def test_the_product_agrees_with_torchs_and_float64(shape: tuple[int, int], rows: int) -> None:
    torch.manual_seed(0)
    outputs, inputs = shape
    stored = weight(outputs, inputs, "cuda")
    x = torch.randn(rows, inputs, device="cuda").bfloat16()
    padded = torch.nn.functional.pad(x, (0, stored.qdata.shape[1] * GROUP - inputs))
    args = (padded, stored.qdata, GROUP, stored.scale_and_zero)
    expected = exact(x, stored)
    found = int4_product(x, stored.qdata, stored.scale_and_zero)
    assert relative(found, expected) < 2**-8  # the error of rounding to BF16
    assert relative(torch.ops.aten._weight_int4pack_mm(*args), expected) < 0.01  # it also rounds weights
    assert torch.equal(found, int4_product(x, stored.qdata, stored.scale_and_zero))
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(rows, -1)  # not aligned
    assert torch.equal(found, int4_product(shifted, stored.qdata, stored.scale_and_zero))
