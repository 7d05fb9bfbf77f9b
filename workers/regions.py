"""Decoder layers that torch.compile compiles once for all of them.

A decoder is one layer many times over. Compiled as a whole, a step of 28 layers is 28 times the work, and
each layer's kernels are tuned anew; as a region that repeats, the layer is compiled once and called 28 times
(`torch.compiler.nested_compile_region`). Measured on one H100 80GB, Qwen2.5-7B: FP16 compiles in 29 s
(`results/h100-table-7b`), as a whole in 54 (`results/h100-kernels-7b`).
"""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

Linear = Callable[..., torch.Tensor]
REGIONS_SINCE = (2, 11)
"""The oldest torch seen to compile regions that write into a cache; an older one compiles the whole step."""


def repeated_layers(model: PreTrainedModel) -> ExitStack:
    """Mark the decoder layers of `model` as regions that repeat, until what is returned is closed."""
    with ExitStack() as marks:
        if torch.__version__ >= REGIONS_SINCE:
            _mark(model, marks)
        return marks.pop_all()


def _mark(model: PreTrainedModel, marks: ExitStack) -> None:
    for kind in {type(layer) for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)}:
        marks.callback(setattr, kind, "forward", kind.forward)
        kind.forward = torch.compiler.nested_compile_region(kind.forward)
    alike: dict[str, Linear] = {}
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and is_traceable_wrapper_subclass(layer.weight):
            layer.forward = _taking_parts(layer, alike)
            marks.callback(delattr, layer, "forward")  # that of the class comes to light again


def _taking_parts(layer: torch.nn.Linear, alike: dict[str, Linear]) -> Linear:
    """`layer.forward`, given what its weight is made of (torchao's are): regions take plain tensors alone.

    What differs from layer to layer are its arguments; the function is one for all that are `alike`.
    """
    kind = type(layer.weight)
    names, context = layer.weight.__tensor_flatten__()
    parts = [getattr(layer.weight, name) for name in names]

    @torch.compiler.allow_in_graph
    def linear(x: torch.Tensor, bias: torch.Tensor | None, *parts: torch.Tensor) -> torch.Tensor:
        weight = kind.__tensor_unflatten__(dict(zip(names, parts, strict=True)), context, None, None)
        return torch.nn.functional.linear(x, weight, bias)

    linear = alike.setdefault(f"{kind} {names} {context}", linear)
    return lambda x: linear(x, layer.bias, *parts)
