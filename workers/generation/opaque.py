"""Linear layers that torch.compile calls as they are, without a look inside.

Kernels of quantization libraries are reached through code that the compiler can't follow: autograd functions,
locks, operators without a description of their result. Where it tries, the step falls into pieces, and a fast
kernel looks slow (Marlin: 12 tok/s instead of 181). One operator of ours stands for all such layers; all that
the compiler knows of it is the shape of what comes out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_forwards: list[Callable[[torch.Tensor], torch.Tensor]] = []
"""Of layers that are opaque now. An operator takes tensors and numbers: each is called by its place here."""


@torch.library.custom_op("qbench::linear", mutates_args=())
def _linear(x: torch.Tensor, place: torch.Tensor, out_features: int) -> torch.Tensor:
    return _forwards[int(place)](x)


@_linear.register_fake
def _(x: torch.Tensor, place: torch.Tensor, out_features: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@contextmanager
def opaque(model: torch.nn.Module, classes: tuple[type, ...]) -> Iterator[None]:
    """Call the layers of these `classes` through an operator that can't be looked into, while in a `with`.

    Each has an attribute `out_features`, and takes (…, in features) to (…, out features) in one dtype.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, classes)]
    own = [vars(layer).get("forward") for layer in layers]
    _forwards.extend(layer.forward for layer in layers)
    for place, layer in enumerate(layers):
        layer.forward = _calling(place, layer.out_features)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                del layer.forward  # that of the class comes to light again
            else:
                layer.forward = forward  # gemlite gives each layer one of its own
        _forwards.clear()


def _calling(place: int, out_features: int) -> Callable[[torch.Tensor], torch.Tensor]:
    # As a number it would be part of the code, which then were another in each decoder layer.
    at = torch.tensor(place)
    return lambda x: torch.ops.qbench.linear(x, at, out_features)
