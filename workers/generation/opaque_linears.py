"""Linear layers that torch.compile calls without tracing into them.

Quantization libraries reach their kernels through code that the compiler can't follow: autograd functions,
locks, operators without a fake implementation. If it tries, the step breaks into many graphs, and a fast
kernel looks slow (Marlin: 12 tok/s instead of 181). Here one custom operator stands for all such layers; the
compiler knows only its output's shape.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_forwards: list[Callable[[torch.Tensor], torch.Tensor]] = []
"""Those of the layers that are opaque now. An operator accepts only tensors and numbers, hence an index."""


@torch.library.custom_op("qbench::linear", mutates_args=())
def _linear(x: torch.Tensor, index: torch.Tensor, out_features: int) -> torch.Tensor:
    return _forwards[int(index)](x)


@_linear.register_fake
def _(x: torch.Tensor, index: torch.Tensor, out_features: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@contextmanager
def opaque_linears(model: torch.nn.Module, classes: tuple[type, ...]) -> Iterator[None]:
    """Within this context, call the layers of these `classes` through an operator that can't be traced.

    Each must have an attribute `out_features` and map (…, in features) to (…, out features) in one dtype.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, classes)]
    instance_forwards = [vars(layer).get("forward") for layer in layers]
    _forwards.extend(layer.forward for layer in layers)
    for index, layer in enumerate(layers):
        layer.forward = _call_opaquely(index, layer.out_features)
    try:
        yield
    finally:
        for layer, forward in zip(layers, instance_forwards, strict=True):
            if forward is None:
                del layer.forward  # uncovers the class's method
            else:
                layer.forward = forward  # gemlite sets one per layer
        _forwards.clear()


def _call_opaquely(index: int, out_features: int) -> Callable[[torch.Tensor], torch.Tensor]:
    # A tensor, because a number would become part of the code, which would then differ between layers.
    index_tensor = torch.tensor(index)
    return lambda x: torch.ops.qbench.linear(x, index_tensor, out_features)
