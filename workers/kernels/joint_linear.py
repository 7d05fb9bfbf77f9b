"""Linear layers that multiply the same input, stored as one and multiplied by as one.

Queries, keys and values are products of one hidden state, and so are a gated MLP's gate and values. A kernel
that shares a product out among all multiprocessors has too little to share where a layer is narrow, and waits
for the last of them after each. Serving engines store such layers side by side for that reason (vLLM's
`QKVParallelLinear` and `MergedColumnParallelLinear`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

# What transformers calls them.
ATTENTION = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj")


class Joint(torch.nn.Module):
    """A `layer` whose outputs are those of several layers, of these `widths`, side by side.

    It multiplies when the first of them is asked, and keeps the others' outputs until they are.
    """

    def __init__(self, layer: torch.nn.Module, widths: Sequence[int]) -> None:
        super().__init__()
        self.layer = layer
        self.widths = list(widths)
        self.input: torch.Tensor | None = None
        self.outputs: dict[int, torch.Tensor] = {}

    def output(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Of the layer at this place, (…, its width), for x of (…, in features)."""
        if x is not self.input or index not in self.outputs:
            self.input, self.outputs = x, dict(enumerate(self.layer(x).split(self.widths, dim=-1)))
        output = self.outputs.pop(index)
        if not self.outputs:
            self.input = None
        return output


class Part(torch.nn.Module):
    """One of the layers that a `Joint` stands for, in its place in the model."""

    def __init__(self, joint: Joint, index: int) -> None:
        super().__init__()
        self.joint = joint
        self.index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.joint.output(self.index, x)


def join_linears(
    model: torch.nn.Module,
    kind: type,
    joined: Callable[[list[Any]], torch.nn.Module | None],
    together: Sequence[tuple[str, ...]] = (ATTENTION, MLP),
) -> None:
    """Let what `joined` makes of them stand for layers of this `kind` that lie `together` in a module.

    It gets them with weights of one class, all with a bias or all without, and makes None of those that have
    to stay apart. The others are freed after each call.
    """
    for parent in [module for module in model.modules() if not isinstance(module, kind)]:
        for names in together:
            layers = [getattr(parent, name, None) for name in names]
            if all(isinstance(layer, kind) for layer in layers) and _alike(layers):
                layer = joined(layers)
                if layer is not None:
                    joint = Joint(layer, [each.out_features for each in layers])
                    for index, name in enumerate(names):
                        setattr(parent, name, Part(joint, index))


def joined_linear(layers: list[Any], weight: torch.Tensor) -> torch.nn.Linear:
    """A layer with this `weight`, and the biases of `layers` one after the other, where they have some."""
    with torch.device("meta"):
        joint = torch.nn.Linear(weight.shape[1], weight.shape[0], layers[0].bias is not None)
    joint.weight = torch.nn.Parameter(weight, requires_grad=False)
    if joint.bias is not None:
        biases = torch.cat([layer.bias for layer in layers])
        joint.bias = torch.nn.Parameter(biases, requires_grad=False)
    return joint.eval()


def joined_setting(model: torch.nn.Module) -> dict[str, str]:
    """What is joined in `model`, for its settings: `{"joined": "gate_proj+up_proj"}`, and {} of nothing."""
    parents = list(model.modules())
    joined = [
        "+".join(names)
        for names in (ATTENTION, MLP)
        if any(isinstance(getattr(parent, names[0], None), Part) for parent in parents)
    ]
    return {"joined": ", ".join(joined)} if joined else {}


def _alike(layers: list[Any]) -> bool:
    # Marlin's layers call their weight otherwise.
    kinds = {(x.in_features, x.bias is None, type(getattr(x, "weight", None))) for x in layers}
    return len(kinds) == 1
