"""How a decode step is compiled: the same numbers from less memory traffic, and each layer's kernels once."""

import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from golden_text import Golden
from small_models import concatenated, small_model
from torch._dynamo.utils import counters
from torch._inductor.runtime.benchmarking import benchmarker
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
from transformers import AutoConfig, PreTrainedModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from workers.generation import compilation
from workers.generation.compilation import CompiledStep, compiler
from workers.generation.decompositions import (
    LONG_DIMENSION,
    MAX_GEMV_ROWS,
    addmm_as_reductions,
    mm_as_reductions,
    two_stage_argmax,
)
from workers.generation.device import Device
from workers.generation.opaque_linears import opaque_linears
from workers.generation.repeated_layers import repeated_layers
from workers.kernels.merged_linear import merge_linears
from workers.protocol.errors import Unsupported

CPU = Device("cpu")
GPU = SimpleNamespace(torch=torch.device("cuda"))
"""Compiles as for a GPU, into code that runs on the CPU of its tensors."""


@pytest.fixture(autouse=True)
def forget_compiled() -> Iterator[None]:
    yield
    compilation.forget_compiled()


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "gemv"), [(1, True), (3, True), (3, False), (MAX_GEMV_ROWS + 1, True)])
def test_small_batches_compile_to_reductions(rows: int, gemv: bool) -> None:
    torch.manual_seed(0)
    linear, plain = torch.nn.Linear(64, 48), torch.nn.Linear(48, 32, bias=False)

    def step(vectors: torch.Tensor) -> torch.Tensor:
        return plain(torch.nn.functional.silu(linear(vectors)))

    vectors = torch.randn(rows, 64)
    with torch.inference_mode():
        result, (code,) = run_and_get_code(compiler(GPU, gemv)(step), vectors)
    assert torch.allclose(result, step(vectors), atol=1e-5)
    assert ("mm(" in code) == (not gemv or rows > MAX_GEMV_ROWS)


@pytest.mark.parametrize("device", [GPU, CPU], ids=["gpu", "cpu"])
def test_the_autograd_cache_is_bypassed(device: Device) -> None:
    """The cache could return products compiled with other decompositions."""
    layer = torch.nn.Linear(64, 48)
    counters.clear()
    with torch.inference_mode():
        compiler(device, gemv=True)(lambda: layer(torch.ones(1, 64)))()
    assert counters["aot_autograd"]["ok"] == 1
    assert not [name for name in counters["aot_autograd"] if "cache" in name]


@pytest.mark.parametrize("rows", [1, 3])
def test_reductions_equal_the_matrix_product(rows: int) -> None:
    torch.manual_seed(0)
    vectors, matrix, bias = torch.randn(rows, 40), torch.randn(40, 30), torch.randn(30)
    assert torch.allclose(mm_as_reductions(vectors, matrix), vectors @ matrix, atol=1e-5)
    with_bias = addmm_as_reductions(bias, vectors, matrix)
    assert torch.allclose(with_bias, torch.addmm(bias, vectors, matrix), atol=1e-5)
    assert addmm_as_reductions(bias, vectors, matrix, alpha=2) is NotImplemented
    assert addmm_as_reductions(bias, vectors, matrix, beta=0) is NotImplemented


def test_large_batches_keep_matrix_kernels() -> None:
    vectors, matrix = torch.randn(MAX_GEMV_ROWS + 1, 40), torch.randn(40, 30)
    assert mm_as_reductions(vectors, matrix) is NotImplemented
    assert addmm_as_reductions(torch.randn(30), vectors, matrix) is NotImplemented


@pytest.mark.parametrize("shape", [(1, 1, 8192), (3, 1, 16384), (32768,)])
def test_a_long_argmax_in_two_stages_picks_the_first_maximum(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = torch.randint(0, 9, shape).float()  # with many ties
    for keepdim in (False, True):
        expected = values.argmax(-1, keepdim)
        assert torch.equal(two_stage_argmax(values, -1, keepdim), expected)
        assert torch.equal(two_stage_argmax(values, values.dim() - 1, keepdim), expected)


def test_other_argmaxes_are_left_to_torch() -> None:
    few, uneven = torch.randn(2, 1000), torch.randn(2, 8192 + 8)
    for values, dim in [(few, -1), (uneven, -1), (torch.randn(8192, 2), 0), (torch.randn(8192), None)]:
        assert two_stage_argmax(values, dim) is NotImplemented


@pytest.mark.parametrize(("terms", "halves"), [(LONG_DIMENSION - 2, False), (LONG_DIMENSION, True)])
def test_long_sums_are_split_in_two(terms: int, halves: bool) -> None:
    torch.manual_seed(0)
    vector, matrix = torch.randn(1, terms), torch.randn(terms, 3)
    traced = make_fx(mm_as_reductions)(vector, matrix)
    assert torch.allclose(traced(vector, matrix), vector @ matrix, atol=1e-3)
    assert any(node.name.startswith("view") for node in traced.graph.nodes) is halves


@pytest.mark.parametrize(
    "message",
    [
        "No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')",
        "Failed to find C compiler. Please specify via CC environment variable",
    ],
    ids=["inductor", "triton"],
)
def test_a_missing_compiler_is_unsupported(
    message: str, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Unsupported) as refused:
        compile_failing_step(message, monkeypatch)
    golden([str(refused.value), refused.value.hint or ""])


def test_other_mentions_of_the_compiler_are_not_renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="set_stance"):
        compile_failing_step("You can do this by torch.compiler.set_stance", monkeypatch)


def compile_failing_step(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def step() -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    CompiledStep(step, CPU, compiler(CPU, gemv=True))


@pytest.mark.slow
@pytest.mark.parametrize("weights", [Int8WeightOnlyConfig, Float8WeightOnlyConfig])
@pytest.mark.parametrize("rows", [1, 4])
def test_dequantized_weights_are_never_materialized(weights: type, rows: int) -> None:
    """Not even for a long sum, whose two halves both read them, with inputs that are computed first."""
    hidden, terms = 64, 2 * LONG_DIMENSION
    torch.manual_seed(0)
    mlp = Qwen2MLP(AutoConfig.for_model("qwen2", hidden_size=hidden, intermediate_size=terms)).bfloat16()
    quantize_(mlp, weights())
    vectors = torch.randn(rows, 1, hidden, dtype=torch.bfloat16)
    with torch.inference_mode():
        result, (code,) = run_and_get_code(compiler(GPU, gemv=True)(mlp), vectors)
        assert torch.allclose(result, mlp(vectors), rtol=0.02, atol=0.02)
    materialized = [
        math.prod(map(int, found.split(",")))
        for found in re.findall(r"empty_strided_cpu\(\(([\d, ]+)\)", code)
    ]
    assert rows * terms in materialized  # the inputs of the long sum
    assert max(materialized) < hidden * terms


def test_the_tuner_flushes_for_longer_than_a_launch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing needs a GPU; the size of the buffer it would flush doesn't."""
    seen = []
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    CompiledStep(lambda: seen.append(benchmarker.L2_cache_size), CPU, compiler(CPU, gemv=True))
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
    """Number of graphs that torch.compile makes of a step of `model`; checks that its logits don't change."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compile_function = partial(torch.compile, backend=backend, dynamic=False)
    ids, got = torch.ones(1, 1, dtype=torch.long), []
    with torch.no_grad(), opaque_linears(model, (torch.nn.Linear,) if kind in ("opaque", "merged") else ()):
        expected = model(ids).logits
        with repeated_layers(model, compile_function) as learn:
            learn(lambda: model(ids, use_cache=False))
            compile_function(lambda: got.append(model(ids, use_cache=False).logits))()
    assert torch.allclose(got[-1], expected, atol=1e-4)
    return len(graphs)


@pytest.mark.parametrize("kind", ["plain", "torchao", "bitsandbytes", "opaque", "merged"])
def test_equal_layers_are_compiled_once(kind: str) -> None:
    model = three_layers()
    if kind == "torchao":
        quantize_(model, Int8WeightOnlyConfig())
    if kind == "bitsandbytes":
        in_four_bits(model)
    if kind == "merged":
        merge_linears(model, torch.nn.Linear, concatenated)
    assert graphs_compiled(model, kind) == 2  # the step, and a layer
    assert all("forward" not in vars(layer) for layer in model.modules())


def test_opaque_layers_keep_an_instance_forward() -> None:
    model = three_layers()
    linears = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    for linear in linears:
        linear.forward = partial(torch.nn.functional.linear, weight=2 * linear.weight.detach())
    before = [linear.forward for linear in linears]
    assert graphs_compiled(model, "opaque") == 2
    assert [linear.forward for linear in linears] == before


def test_different_layers_are_compiled_separately() -> None:
    model = three_layers()
    model.model.layers[1].mlp.act_fn = torch.nn.Tanh()
    assert graphs_compiled(model) == 3


def test_graph_breaks_inside_a_layer_are_counted() -> None:
    model, got = three_layers(), []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    ids, compile_function = torch.ones(1, 1, dtype=torch.long), compiler(CPU, gemv=True)
    with torch.no_grad(), repeated_layers(model, compile_function) as learn:
        learn(lambda: model(ids))
        step = CompiledStep(lambda: got.append(model(ids).logits), CPU, compile_function)
        assert torch.allclose(got[-1], model(ids).logits, atol=1e-4)
    assert step.graph_breaks > 0


def test_onednn_patterns_are_disabled_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products that they would replace only exist on a GPU."""
    enabled = []

    def compile_fx(graph: torch.fx.GraphModule, *_: object, **__: object) -> Callable[..., object]:
        enabled.append(torch.backends.mkldnn.enabled)
        return graph.forward

    monkeypatch.setattr(compilation, "compile_fx", compile_fx)
    compiler(GPU, gemv=True)(lambda x: x + 1)(torch.ones(1))
    assert enabled == [False]
    assert torch.backends.mkldnn.enabled
