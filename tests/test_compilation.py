"""How a decode step is compiled: the same numbers from less memory traffic, and each layer's kernels once."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.runtime.benchmarking import benchmarker
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from workers import compilation, regions
from workers.compilation import CompiledStep
from workers.device import Device
from workers.opaque import opaque
from workers.regions import repeated_layers


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    compilation.forget_compiled()


@pytest.mark.slow
def test_products_of_one_row_compile_to_what_they_are() -> None:
    torch.manual_seed(0)
    linear, plain = torch.nn.Linear(64, 48), torch.nn.Linear(48, 32, bias=False)

    def step(vector: torch.Tensor) -> torch.Tensor:
        return plain(torch.nn.functional.silu(linear(vector)))

    compiled = torch.compile(step, backend=compilation._backend, dynamic=False)
    with torch.inference_mode():
        for rows in (1, 3):
            vector = torch.randn(rows, 64)
            assert torch.allclose(compiled(vector), step(vector), atol=1e-5)


def test_no_cache_answers_with_products_that_another_version_made() -> None:
    layer = torch.nn.Linear(64, 48)
    counters.clear()
    with torch.inference_mode():
        torch.compile(lambda: layer(torch.ones(1, 64)), backend=compilation._backend, dynamic=False)()
    assert counters["aot_autograd"]["ok"] == 1
    assert not [name for name in counters["aot_autograd"] if "cache" in name]


def test_a_product_of_one_row_is_a_sum() -> None:
    torch.manual_seed(0)
    vector, matrix, bias = torch.randn(1, 40), torch.randn(40, 30), torch.randn(30)
    assert torch.allclose(compilation._product(vector, matrix), vector @ matrix, atol=1e-5)
    summed = compilation._product_with_bias(bias, vector, matrix)
    assert torch.allclose(summed, torch.addmm(bias, vector, matrix), atol=1e-5)
    assert compilation._product(torch.randn(2, 40), matrix) is NotImplemented
    assert compilation._product_with_bias(bias, vector, matrix, alpha=2) is NotImplemented


@pytest.mark.parametrize(
    ("terms", "halves"), [(compilation.LONG_SUM - 2, False), (compilation.LONG_SUM, True)]
)
def test_long_sums_are_made_in_halves(terms: int, halves: bool) -> None:
    torch.manual_seed(0)
    vector, matrix = torch.randn(1, terms), torch.randn(terms, 3)
    traced = make_fx(compilation._product)(vector, matrix)
    assert torch.allclose(traced(vector, matrix), vector @ matrix, atol=1e-3)
    assert any(node.name.startswith("view") for node in traced.graph.nodes) is halves


@pytest.mark.slow
def test_a_dequantized_weight_is_never_written_out() -> None:
    """Not even for a long sum, which has two halves to read it from."""
    rows, terms = 64, 2 * compilation.LONG_SUM
    weight = torch.randn(rows, terms).to(torch.float8_e4m3fn)
    scales = torch.rand(rows, 1)

    def step(vector: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(vector, (weight.float() * scales).bfloat16())

    compiled = torch.compile(step, backend=compilation._backend, dynamic=False)
    vector = torch.randn(1, terms, dtype=torch.bfloat16)
    with torch.inference_mode():
        result, (code,) = run_and_get_code(compiled, vector)
    assert torch.allclose(result.float(), step(vector).float(), rtol=0.02, atol=1.0)
    assert f"{rows}, {terms}" in code  # of the weight itself
    assert "empty_strided_cpu" in code
    written = [line for line in code.splitlines() if "empty_strided_cpu((" in line and str(terms) in line]
    assert written == []


def test_the_tuner_flushes_for_longer_than_a_launch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its times need a GPU; which buffer it would write over doesn't."""
    seen = []
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    CompiledStep(lambda: seen.append(benchmarker.L2_cache_size), ExitStack(), Device("cpu"))
    assert seen == [compilation.FLUSH_BYTES]
    assert "L2_cache_size" not in vars(benchmarker)


# Decoder layers


def small_model() -> PreTrainedModel:
    config = AutoConfig.for_model(
        "llama",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=128,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def regions_called(model: PreTrainedModel) -> list[str]:
    """The name of the region at each place where a compiled step of `model` calls one."""
    called = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        calls = graph.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph)
        called.extend(call.args[0].target for call in calls)
        return graph

    ids = torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad():
        expected = model(ids).logits
        compiled = torch.compile(lambda: model(ids, use_cache=False).logits, backend=backend)
        assert torch.allclose(compiled(), expected, atol=1e-4)
    return called


@pytest.mark.parametrize("kind", ["plain", "torchao", "opaque"])
def test_layers_that_are_alike_are_one_region(kind: str) -> None:
    model = small_model()
    if kind == "torchao":
        quantize_(model, Int8WeightOnlyConfig())
    with opaque(model, (torch.nn.Linear,) if kind == "opaque" else ()), repeated_layers(model):
        called = regions_called(model)
    assert len(called) == 3
    assert len(set(called)) == 1
    compilation.forget_compiled()
    assert regions_called(model) == []


def test_an_older_torch_compiles_the_step_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "REGIONS_SINCE", (99, 0))
    model = small_model()
    with repeated_layers(model):
        assert regions_called(model) == []


def test_a_layer_that_cannot_be_a_region_is_compiled_with_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, compile_it = small_model(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **_: compile_it(step, backend="eager"))
    layer = model.model.layers[1].mlp
    inside, layer.forward = layer.forward, lambda x: torch._dynamo.graph_break() or inside(x)
    ids, got = torch.ones(1, 4, dtype=torch.long), []
    with torch.no_grad(), repeated_layers(model) as marked:
        step = CompiledStep(lambda: got.append(model(ids).logits), marked, Device("cpu"))
        assert torch.allclose(got[-1], model(ids).logits)
    assert len(got) == 1
    assert step.graph_breaks > 0


def test_regions_that_the_backend_fails_on_are_compiled_with_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, compile_it = small_model(), torch.compile

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        if graph.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph):
            raise RuntimeError("no autograd.Function with functorch transforms")
        return graph

    monkeypatch.setattr(torch, "compile", lambda step, **_: compile_it(step, backend=backend))
    ids, got = torch.ones(1, 4, dtype=torch.long), []
    with torch.no_grad(), repeated_layers(model) as marked:
        step = CompiledStep(lambda: got.append(model(ids, use_cache=False).logits), marked, Device("cpu"))
        assert torch.allclose(got[-1], model(ids, use_cache=False).logits, atol=1e-4)
    assert step.graph_breaks == 0


def test_onednn_is_off_while_a_step_for_a_gpu_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a pattern of its would replace takes a GPU to see."""
    seen = []
    monkeypatch.setattr(
        compilation.compile_fx, "compile_fx", lambda *_, **__: seen.append(torch.backends.mkldnn.enabled)
    )
    compilation._backend(torch.fx.GraphModule({}, torch.fx.Graph()), [])
    assert seen == [False]
    assert torch.backends.mkldnn.enabled
