"""torch.compile for a decode step of one row: Inductor, told what such a step is.

With one row every linear layer is a matrix–vector product, which reads each weight once and multiplies it
once. Matrix kernels are made for many rows; a plain reduction reads faster. Inductor knows that, but
turns to it only for layers without bias and while it tunes each kernel by coordinate descent, which takes
longer than all the rest (cf. gpt-fast, "Accelerating Generative AI with PyTorch II", pytorch.org 2023).
Here all products of one row are reductions. Activations are written out before they are multiplied, since a
reduction would compute them again for every row of the weight. Long sums are made in two halves: there are
few of them, and a GPU ends them together only if it has many to share out. For weights of eight bits each
reduction takes the fastest of a few ways to cut it into blocks: the usual one suits 16 bits, and tuning only
loses there.

Measured on one H100 80GB, Qwen2.5-7B: FP16 runs at 182 tok/s, at 175 with block sizes tuned, and at 152 with
Inductor's own choice and tuning by coordinate descent (whole sums, all three). Its longest product, 3,584
sums of 18,944 terms, takes 52 µs in FP16 and 38 µs in INT8 (by hand); in halves 46 and 30
(`results/h100-kernels-7b`).
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor import compile_fx, decomposition
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from workers.device import Device
from workers.protocol import Unsupported

INDUCTOR = {"realize_opcount_threshold": 8, "realize_acc_reads_threshold": 2}
"""Operations, and buffers read, beyond which an intermediate result is written out and not computed again."""
TUNED = {"max_autotune_pointwise": True}
"""Measures a few ways to cut a reduction into blocks; matrix kernels stay as they are."""
LONG_SUM = 8192
"""Terms from which on a sum is made in two halves."""


class CompiledStep:
    """A step compiled by running it once."""

    def __init__(self, step: Callable[[], None], device: Device) -> None:
        counters.clear()
        backend = _backend if device.torch.type == "cuda" else "inductor"
        self.step = torch.compile(step, backend=backend, dynamic=False)
        start_ns = time.monotonic_ns()
        self._compile()
        device.synchronize()
        self.compile_s = (time.monotonic_ns() - start_ns) / 1e9
        self.graph_breaks = sum(counters["graph_break"].values())

    def __call__(self) -> None:
        self.step()

    def _compile(self) -> None:
        try:
            self.step()
        except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
            if "compiler" in str(error):
                raise Unsupported(
                    "torch.compile finds no C++ compiler", "install g++, or leave compile out of --decode"
                ) from error
            raise


def forget_compiled() -> None:
    """Free what torch.compile keeps."""
    torch._dynamo.reset()


def _backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
    table = {
        **decomposition.select_decomp_table(),
        torch.ops.aten.mm.default: _product,
        torch.ops.aten.addmm.default: _product_with_bias,
    }
    tuned = TUNED if has_matrices_of_bytes(inputs) else {}
    # This cache goes by the graph as it is before decomposition, so it could answer with other products than
    # ours. Inductor's own, which goes by what it is given to compile, stays on.
    with functorch_config.patch(enable_autograd_cache=False):
        return compile_fx.compile_fx(graph, inputs, config_patches=INDUCTOR | tuned, decompositions=table)


def has_matrices_of_bytes(inputs: Iterable[object]) -> bool:
    """Whether a matrix among the inputs of a graph holds one byte a value, be it inside another tensor."""
    tensors = (part for each in inputs if isinstance(each, torch.Tensor) for part in _parts(each))
    return any(tensor.ndim == 2 and tensor.itemsize == 1 for tensor in tensors)


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names if isinstance(part := getattr(tensor, name), torch.Tensor)]


def _product(vector: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """(1, k) × (k, n) as a reduction, summed in float32 as a matrix product would be."""
    if vector.shape[0] != 1:
        return NotImplemented
    terms = vector.float().unsqueeze(2) * matrix.float().unsqueeze(0)
    count, sums = matrix.shape
    if count >= LONG_SUM and count % 2 == 0:
        terms = terms.view(2, count // 2, sums).sum(dim=1).unsqueeze(0)
    return terms.sum(dim=1).to(vector.dtype)


def _product_with_bias(
    bias: torch.Tensor, vector: torch.Tensor, matrix: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    if vector.shape[0] != 1 or beta != 1 or alpha != 1:
        return NotImplemented
    return _product(vector, matrix) + bias
