"""Linear layers that multiply the same input, stored and multiplied as one.

Queries, keys and values are products of one hidden state, and so are a gated MLP's gate and up projections. A
kernel that spreads a product over all multiprocessors has too little work to spread if a layer is narrow, and
waits for the last of them after each product. Serving engines merge such layers for the same reason (vLLM's
`QKVParallelLinear` and `MergedColumnParallelLinear`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

# Names of the layers in transformers.
ATTENTION = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj")


class MergedLinear(torch.nn.Module):
    """A `layer` whose outputs are those of several layers, of these `widths`, concatenated.

    It multiplies when the first of them is called, and keeps the others' outputs until they are called.
    """

    def __init__(self, layer: torch.nn.Module, widths: Sequence[int]) -> None:
        super().__init__()
        self.layer = layer
        self.widths = list(widths)
        self.input: torch.Tensor | None = None
        self.outputs: dict[int, torch.Tensor] = {}

    def output(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Output of the layer with this index, (…, its width), for x of (…, in features)."""
        if x is not self.input or index not in self.outputs:
            self.input, self.outputs = x, dict(enumerate(self.layer(x).split(self.widths, dim=-1)))
        output = self.outputs.pop(index)
        if not self.outputs:
            self.input = None
        return output


class MergedOutput(torch.nn.Module):
    """Stands in the model for one of the layers of a `MergedLinear`."""

    def __init__(self, merged: MergedLinear, index: int) -> None:
        super().__init__()
        self.merged = merged
        self.index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.merged.output(self.index, x)


def merge_linears(
    model: torch.nn.Module,
    kind: type,
    merge: Callable[[list[Any]], torch.nn.Module | None],
    candidates: Sequence[tuple[str, ...]] = (ATTENTION, MLP),
) -> None:
    """Replace sibling layers of this `kind` whose names are one of the `candidates` by what `merge` returns.

    `merge` gets layers whose weights have the same class, all with a bias or all without, and returns None
    for those that must stay separate. The original layers are freed after each call.
    """
    for parent in [module for module in model.modules() if not isinstance(module, kind)]:
        for names in candidates:
            layers = [getattr(parent, name, None) for name in names]
            if all(isinstance(layer, kind) for layer in layers) and _are_alike(layers):
                layer = merge(layers)
                if layer is not None:
                    merged = MergedLinear(layer, [each.out_features for each in layers])
                    for index, name in enumerate(names):
                        setattr(parent, name, MergedOutput(merged, index))


def merged_linear(layers: list[Any], weight: torch.Tensor) -> torch.nn.Linear:
    """A layer with this `weight` and the concatenated biases of `layers`, if they have any."""
    with torch.device("meta"):
        merged = torch.nn.Linear(weight.shape[1], weight.shape[0], layers[0].bias is not None)
    merged.weight = torch.nn.Parameter(weight, requires_grad=False)
    if merged.bias is not None:
        biases = torch.cat([layer.bias for layer in layers])
        merged.bias = torch.nn.Parameter(biases, requires_grad=False)
    return merged.eval()


def merged_setting(model: torch.nn.Module) -> dict[str, str]:
    """A setting that names `model`'s merged layers, `{"joined": "gate_proj+up_proj"}`; {} if it has none."""
    parents = list(model.modules())
    merged = [
        "+".join(names)
        for names in (ATTENTION, MLP)
        if any(isinstance(getattr(parent, names[0], None), MergedOutput) for parent in parents)
    ]
    return {"joined": ", ".join(merged)} if merged else {}


def _are_alike(layers: list[Any]) -> bool:
    # Marlin's layers have no attribute `weight`.
    kinds = {(x.in_features, x.bias is None, type(getattr(x, "weight", None))) for x in layers}
    return len(kinds) == 1
