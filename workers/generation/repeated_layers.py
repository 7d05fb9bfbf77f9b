"""Decoder layers that torch.compile compiles once for all of them.

A decoder is one layer repeated many times. If a step is traced as a whole, all its layers are traced,
although they share code and kernels: for Qwen2.5-7B's 28 layers that took 12 to 28 s
(`results/h100-best-7b`). Here the step calls its layers through a custom operator that the compiler doesn't
trace into, and the first call of a layer compiles the code that all of them share: 2 to 14 s
(`results/h100-table-7b`).

torch.compile distinguishes layers by their index, which selects their part of the cache. So the compiler sees
a copy of each layer that shares its weights, has index 0, and gets a cache of a single layer.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from workers.generation.compilation import Compile
from workers.generation.static_cache import SlotLayer

Learn = Callable[[Callable[[], None]], None]
_layers: "list[RepeatedLayer]" = []
"""Those of the step being compiled. An operator accepts only tensors and numbers, so it gets an index."""


@torch.library.custom_op("qbench::decoder_layer", mutates_args=())
def _decoder_layer(hidden: torch.Tensor, others: list[torch.Tensor], index: int) -> torch.Tensor:
    return _layers[index].run(hidden, others)


@_decoder_layer.register_fake
def _(hidden: torch.Tensor, others: list[torch.Tensor], index: int) -> torch.Tensor:
    return torch.empty_like(hidden)


class RepeatedLayer:
    """A decoder layer as a compiled step sees it: an operator whose body is compiled separately."""

    def __init__(self, layer: torch.nn.Module, index: int, compiled: Callable[..., torch.Tensor]) -> None:
        self.eager_forward = layer.forward
        self.index = index
        self.copy = _copy_with_index_0(layer)
        self.compiled = compiled
        self.learning = False
        self.example: Any = None
        """Positional and named arguments of a step's call, apart from the hidden state."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.qbench.decoder_layer(hidden_states, _tensors((args, kwargs)), self.index)
        if self.learning:
            self.example = (args, kwargs)
        return self.eager_forward(hidden_states, *args, **kwargs)

    def run(self, hidden: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
        """Call the compiled layer like its example, with these tensors."""
        leaves, spec = tree_flatten(self.example)
        tensors = iter(others)
        arguments = [
            next(tensors) if isinstance(leaf, torch.Tensor) else self._own_cache(leaf) for leaf in leaves
        ]
        args, kwargs = tree_unflatten(arguments, spec)
        return self.compiled(self.copy, hidden, *args, **kwargs)

    def _own_cache(self, leaf: Any) -> Any:
        return Cache(layers=[leaf.layers[self.index]]) if isinstance(leaf, Cache) else leaf


@contextmanager
def repeated_layers(model: PreTrainedModel, compile_function: Compile) -> Iterator[Learn]:
    """Within this context, compiled steps of `model` call its decoder layers through `compile_function`.

    Every layer must have its own entry in the cache. Pass the step to the yielded function before compiling
    it: it runs the step once in eager mode to record the layers' non-tensor arguments.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    forwards = {type(layer): compile_function(type(layer).forward) for layer in layers}
    _layers.extend(RepeatedLayer(layer, index, forwards[type(layer)]) for index, layer in enumerate(layers))
    for layer, repeated in zip(layers, _layers, strict=True):
        layer.forward = repeated.forward
    try:
        yield _learn
    finally:
        for layer in layers:
            del layer.forward  # uncovers the class's method
        _layers.clear()


def _learn(step: Callable[[], None]) -> None:
    for layer in _layers:
        layer.learning = True
    step()
    for layer in _layers:
        layer.learning = False


def _copy_with_index_0(layer: torch.nn.Module) -> torch.nn.Module:
    """A copy with the same weights and index 0. Modules that share a submodule still share its copy."""
    copies = {module: copy.copy(module) for module in layer.modules()}
    for module, copied in copies.items():
        copied._modules = {
            name: copies[child] for name, child in module._modules.items() if child is not None
        }
        if hasattr(copied, "layer_idx"):
            copied.layer_idx = 0
    return copies[layer]


def _tensors(arguments: Any) -> list[torch.Tensor]:
    """The tensors among the arguments, and the slot that a layer reads through its cache.

    The step advances the slot after its layers have run; if the slot weren't an input, the compiler could
    advance it earlier.
    """
    leaves = tree_leaves(arguments)
    caches = [leaf for leaf in leaves if isinstance(leaf, Cache)]
    slots = [cache.layers[0].slot.index for cache in caches if isinstance(cache.layers[0], SlotLayer)]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)] + slots
