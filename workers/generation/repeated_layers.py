"""Decoder layers that torch.compile compiles once for all of them.

A decoder is one layer many times over. A step that is traced as a whole has 28 layers to be walked through,
each of the same code, even where their kernels are made once: for Qwen2.5-7B that took 12 to 28 s
(`results/h100-best-7b`). Here the step calls its layers through one operator, which the compiler doesn't look
into, and the first call of a layer compiles the code that all share: 2 to 14 s (`results/h100-table-7b`).

What tells layers apart for torch.compile is their index, by which they find their part of the cache. So each
has a twin for the compiler, with the same weights, that takes itself for the first and gets a cache of one.
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
"""Those of the step that is compiled now. An operator takes tensors and numbers: a layer is called by its
place here."""


@torch.library.custom_op("qbench::decoder_layer", mutates_args=())
def _decoder_layer(hidden: torch.Tensor, others: list[torch.Tensor], place: int) -> torch.Tensor:
    return _layers[place].run(hidden, others)


@_decoder_layer.register_fake
def _(hidden: torch.Tensor, others: list[torch.Tensor], place: int) -> torch.Tensor:
    return torch.empty_like(hidden)


class RepeatedLayer:
    """A decoder layer as a compiled step sees it: an operator, whose insides are compiled by themselves."""

    def __init__(self, layer: torch.nn.Module, place: int, compiled: Callable[..., torch.Tensor]) -> None:
        self.plain = layer.forward
        self.place = place
        self.twin = _as_first(layer)
        self.compiled = compiled
        self.learning = False
        self.example: Any = None
        """What a step calls it with after the hidden state: positional and named arguments."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.qbench.decoder_layer(hidden_states, _tensors((args, kwargs)), self.place)
        if self.learning:
            self.example = (args, kwargs)
        return self.plain(hidden_states, *args, **kwargs)

    def run(self, hidden: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
        """The compiled layer, called like its example but for the tensors."""
        leaves, shape = tree_flatten(self.example)
        tensors = iter(others)
        arguments = [next(tensors) if isinstance(leaf, torch.Tensor) else self._own(leaf) for leaf in leaves]
        args, kwargs = tree_unflatten(arguments, shape)
        return self.compiled(self.twin, hidden, *args, **kwargs)

    def _own(self, leaf: Any) -> Any:
        return Cache(layers=[leaf.layers[self.place]]) if isinstance(leaf, Cache) else leaf


@contextmanager
def repeated_layers(model: PreTrainedModel, compiled: Compile) -> Iterator[Learn]:
    """Let compiled steps of `model` call its decoder layers one by one, each through `compiled`.

    Every layer has a place of its own in the cache. What is yielded wants the step before it is compiled, and
    makes it once as it is: from there it takes what layers are called with beside tensors.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    kinds = {type(layer): compiled(type(layer).forward) for layer in layers}
    _layers.extend(RepeatedLayer(layer, place, kinds[type(layer)]) for place, layer in enumerate(layers))
    for layer, repeated in zip(layers, _layers, strict=True):
        layer.forward = repeated.forward
    try:
        yield _learn
    finally:
        for layer in layers:
            del layer.forward  # that of the class comes to light again
        _layers.clear()


def _learn(step: Callable[[], None]) -> None:
    for layer in _layers:
        layer.learning = True
    step()
    for layer in _layers:
        layer.learning = False


def _as_first(layer: torch.nn.Module) -> torch.nn.Module:
    """`layer` with the weights that it has, and the index of the first. What its modules share, theirs do."""
    twins = {module: copy.copy(module) for module in layer.modules()}
    for module, twin in twins.items():
        twin._modules = {name: twins[child] for name, child in module._modules.items() if child is not None}
        if hasattr(twin, "layer_idx"):
            twin.layer_idx = 0
    return twins[layer]


def _tensors(arguments: Any) -> list[torch.Tensor]:
    """Tensors among the arguments, and those that a layer reads through its cache.

    That is the slot. The step moves it on once its layers are through; were it not named, it might earlier.
    """
    leaves = tree_leaves(arguments)
    caches = [leaf for leaf in leaves if isinstance(leaf, Cache)]
    slots = [cache.layers[0].slot.index for cache in caches if isinstance(cache.layers[0], SlotLayer)]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)] + slots
