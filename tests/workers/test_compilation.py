"""How a decode step is compiled: the same numbers from less memory traffic, and each layer's kernels once."""

import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import bitsandbytes
import pytest
import torch
from small_models import side_by_side, small_model
from torch._dynamo.utils import counters
from torch._inductor.runtime.benchmarking import benchmarker
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
from transformers import AutoConfig, PreTrainedModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from workers.generation import compilation
from workers.generation.compilation import CompiledStep
from workers.generation.device import Device
from workers.generation.opaque import opaque
from workers.generation.repeated_layers import repeated_layers
from workers.kernels.joint_linear import join_linears
from workers.protocol.errors import Unsupported

CPU = Device("cpu")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    compilation.forget_compiled()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "summed"), [(1, True), (3, True), (3, False), (compilation.MOST_SUMS + 1, True)]
)
def test_few_rows_are_multiplied_by_sums(rows: int, summed: bool) -> None:
    torch.manual_seed(0)
    linear, plain = torch.nn.Linear(64, 48), torch.nn.Linear(48, 32, bias=False)

    def step(vectors: torch.Tensor) -> torch.Tensor:
        return plain(torch.nn.functional.silu(linear(vectors)))

    compiled = torch.compile(step, backend=partial(compilation._for_gpu, summed=summed), dynamic=False)
    vectors = torch.randn(rows, 64)
    with torch.inference_mode():
        result, (code,) = run_and_get_code(compiled, vectors)
    assert torch.allclose(result, step(vectors), atol=1e-5)
    assert ("mm(" in code) == (not summed or rows > compilation.MOST_SUMS)


@pytest.mark.parametrize("backend", [partial(compilation._for_gpu, summed=True), compilation._for_cpu])
def test_no_cache_answers_with_products_that_another_version_made(backend: Callable[..., Any]) -> None:
    layer = torch.nn.Linear(64, 48)
    counters.clear()
    with torch.inference_mode():
        torch.compile(lambda: layer(torch.ones(1, 64)), backend=backend, dynamic=False)()
    assert counters["aot_autograd"]["ok"] == 1
    assert not [name for name in counters["aot_autograd"] if "cache" in name]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_product_of_few_rows_is_their_sums(rows: int) -> None:
    torch.manual_seed(0)
    vectors, matrix, bias = torch.randn(rows, 40), torch.randn(40, 30), torch.randn(30)
    assert torch.allclose(compilation._product(vectors, matrix), vectors @ matrix, atol=1e-5)
    summed = compilation._product_with_bias(bias, vectors, matrix)
    assert torch.allclose(summed, torch.addmm(bias, vectors, matrix), atol=1e-5)
    assert compilation._product_with_bias(bias, vectors, matrix, alpha=2) is NotImplemented
    assert compilation._product_with_bias(bias, vectors, matrix, beta=0) is NotImplemented


def test_many_rows_are_left_to_matrix_kernels() -> None:
    vectors, matrix = torch.randn(compilation.MOST_SUMS + 1, 40), torch.randn(40, 30)
    assert compilation._product(vectors, matrix) is NotImplemented
    assert compilation._product_with_bias(torch.randn(30), vectors, matrix) is NotImplemented


@pytest.mark.parametrize("shape", [(1, 1, 8192), (3, 1, 16384), (32768,)])
def test_the_largest_of_many_is_found_in_parts(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = torch.randint(0, 9, shape).float()  # most of them tie, and the first of these is wanted
    for keepdim in (False, True):
        expected = values.argmax(-1, keepdim)
        assert torch.equal(compilation._argmax(values, -1, keepdim), expected)
        assert torch.equal(compilation._argmax(values, values.dim() - 1, keepdim), expected)


def test_the_largest_of_few_is_left_to_torch() -> None:
    few, uneven = torch.randn(2, 1000), torch.randn(2, 8192 + 8)
    for values, dim in [(few, -1), (uneven, -1), (torch.randn(8192, 2), 0), (torch.randn(8192), None)]:
        assert compilation._argmax(values, dim) is NotImplemented


@pytest.mark.parametrize(
    ("terms", "halves"), [(compilation.LONG_SUM - 2, False), (compilation.LONG_SUM, True)]
)
def test_long_sums_are_made_in_halves(terms: int, halves: bool) -> None:
    torch.manual_seed(0)
    vector, matrix = torch.randn(1, terms), torch.randn(terms, 3)
    traced = make_fx(compilation._product)(vector, matrix)
    assert torch.allclose(traced(vector, matrix), vector @ matrix, atol=1e-3)
    assert any(node.name.startswith("view") for node in traced.graph.nodes) is halves


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        ("No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')", Unsupported),
        ("Failed to find C compiler. Please specify via CC environment variable", Unsupported),
        ("You can do this by torch.compiler.set_stance", RuntimeError),
    ],
)
def test_only_a_missing_compiler_is_called_one(
    said: str, refused: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def step() -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    with pytest.raises(refused):
        CompiledStep(step, CPU, compilation.compiler(CPU, summed=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "rows"),
    [
        (Int8WeightOnlyConfig, 1),
        (Int8WeightOnlyConfig, 4),
        (Float8WeightOnlyConfig, 1),
        (Float8WeightOnlyConfig, 4),
    ],
)
def test_dequantized_weights_are_never_written_out(weights: type, rows: int) -> None:
    """Not even for a long sum, which has two halves to read them from, of inputs that are computed before."""
    hidden, terms = 64, 2 * compilation.LONG_SUM
    torch.manual_seed(0)
    mlp = Qwen2MLP(AutoConfig.for_model("qwen2", hidden_size=hidden, intermediate_size=terms)).bfloat16()
    quantize_(mlp, weights())
    compiled = torch.compile(mlp, backend=partial(compilation._for_gpu, summed=True), dynamic=False)
    vectors = torch.randn(rows, 1, hidden, dtype=torch.bfloat16)
    with torch.inference_mode():
        result, (code,) = run_and_get_code(compiled, vectors)
        assert torch.allclose(result, mlp(vectors), rtol=0.02, atol=0.02)
    written = [
        math.prod(map(int, found.split(",")))
        for found in re.findall(r"empty_strided_cpu\(\(([\d, ]+)\)", code)
    ]
    assert rows * terms in written  # the inputs of the long sum
    assert max(written) < hidden * terms


def test_the_tuner_flushes_for_longer_than_a_launch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its times need a GPU; which buffer it would write over doesn't."""
    seen = []
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    CompiledStep(lambda: seen.append(benchmarker.L2_cache_size), CPU, compilation.compiler(CPU, summed=True))
    assert seen == [compilation.FLUSH_BYTES]
    assert "L2_cache_size" not in vars(benchmarker)


# Decoder layers


def three_layers() -> PreTrainedModel:
    return small_model("llama", num_hidden_layers=3, num_key_value_heads=4)


def in_four_bits(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        for module in (layer.self_attn, layer.mlp):
            for name, linear in list(module.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    quantized = bitsandbytes.nn.Linear4bit(
                        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32
                    )
                    quantized.load_state_dict(linear.state_dict())
                    setattr(module, name, quantized.to("cpu"))


def graphs_compiled(model: PreTrainedModel, kind: str = "plain") -> int:
    """How many graphs torch.compile makes of a step of `model`, whose logits must be those that it had."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = partial(torch.compile, backend=backend, dynamic=False)
    ids, got = torch.ones(1, 1, dtype=torch.long), []
    with torch.no_grad(), opaque(model, (torch.nn.Linear,) if kind in ("opaque", "joint") else ()):
        expected = model(ids).logits
        with repeated_layers(model, compiled) as learn:
            learn(lambda: model(ids, use_cache=False))
            compiled(lambda: got.append(model(ids, use_cache=False).logits))()
    assert torch.allclose(got[-1], expected, atol=1e-4)
    return len(graphs)


@pytest.mark.parametrize("kind", ["plain", "torchao", "bitsandbytes", "opaque", "joint"])
def test_layers_that_are_alike_are_compiled_once(kind: str) -> None:
    model = three_layers()
    if kind == "torchao":
        quantize_(model, Int8WeightOnlyConfig())
    if kind == "bitsandbytes":
        in_four_bits(model)
    if kind == "joint":
        join_linears(model, torch.nn.Linear, side_by_side)
    assert graphs_compiled(model, kind) == 2  # the step, and a layer
    assert all("forward" not in vars(layer) for layer in model.modules())


def test_opaque_layers_with_a_forward_of_their_own_keep_it() -> None:
    model = three_layers()
    linears = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    for linear in linears:
        linear.forward = partial(torch.nn.functional.linear, weight=2 * linear.weight.detach())
    own = [linear.forward for linear in linears]
    assert graphs_compiled(model, "opaque") == 2
    assert [linear.forward for linear in linears] == own


def test_layers_that_differ_are_compiled_apart() -> None:
    model = three_layers()
    model.model.layers[1].mlp.act_fn = torch.nn.Tanh()
    assert graphs_compiled(model) == 3


def test_a_layer_that_is_compiled_in_pieces_tells() -> None:
    model, got = three_layers(), []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    ids, compiled = torch.ones(1, 1, dtype=torch.long), compilation.compiler(CPU, summed=True)
    with torch.no_grad(), repeated_layers(model, compiled) as learn:
        learn(lambda: model(ids))
        step = CompiledStep(lambda: got.append(model(ids).logits), CPU, compiled)
        assert torch.allclose(got[-1], model(ids).logits, atol=1e-4)
    assert step.graph_breaks > 0


def test_onednn_is_off_while_a_step_for_a_gpu_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a pattern of its would replace takes a GPU to see."""
    seen = []
    monkeypatch.setattr(
        compilation.compile_fx, "compile_fx", lambda *_, **__: seen.append(torch.backends.mkldnn.enabled)
    )
    compilation._for_gpu(torch.fx.GraphModule({}, torch.fx.Graph()), [], summed=True)
    assert seen == [False]
    assert torch.backends.mkldnn.enabled
