"""torch.compile for a decode step of one row: Inductor, told what such a step is.

With one row every linear layer is a matrix–vector product, which reads each weight once and multiplies it
once. Matrix kernels are made for many rows; a plain reduction reads faster. Inductor knows that, but
turns to it only for layers without bias and while it tunes each kernel by coordinate descent, which takes
longer than all the rest (cf. gpt-fast, "Accelerating Generative AI with PyTorch II", pytorch.org 2023).
Here all products of one row are reductions. Activations are written out before they are multiplied, since a
reduction would compute them again for every row of the weight. Long sums are made in two halves: there are
few of them, and a GPU ends them together only if it has many to share out. Each kernel takes the fastest of a
few ways to cut it into blocks, and decoder layers share their kernels (`workers/regions.py`).

Measured on one H100 80GB, Qwen2.5-7B: FP16 runs at 189 tok/s (`results/h100-table-7b`), and at 152 with
Inductor's own choice and tuning by coordinate descent (one run by hand).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException, UncapturedHigherOrderOpError
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor import compile_fx, decomposition
from torch._inductor.runtime.benchmarking import benchmarker

from workers.device import Device
from workers.protocol import Unsupported

INDUCTOR = {
    # Reads, and operations, beyond which an intermediate result is written out and not computed again: no
    # more than it takes to multiply by a dequantized weight.
    "realize_acc_reads_threshold": 3,
    "realize_opcount_threshold": 9,
    # Measures a few ways to cut a kernel into blocks; matrix kernels stay as they are.
    "max_autotune_pointwise": True,
}
LONG_SUM = 8192
"""Terms from which on a sum is made in two halves."""
FLUSH_BYTES = 1 << 28
"""Written by the tuner between two runs of a kernel: 0.1 ms, in which any host gets out the next launch."""


class CompiledStep:
    """A step compiled by running it once, with its `regions` compiled once for all where that can be."""

    def __init__(self, step: Callable[[], None], regions: ExitStack, device: Device) -> None:
        backend = _backend if device.torch.type == "cuda" else "inductor"
        self.step = torch.compile(step, backend=backend, dynamic=False)
        start_ns = time.monotonic_ns()
        try:
            with _tuned_apart_from_launches():
                self._compile(regions)
        except (TorchDynamoException, RuntimeError) as error:
            if "compiler" in str(error):
                raise Unsupported(
                    "torch.compile finds no C++ compiler", "install g++, or leave compile out of --decode"
                ) from error
            raise
        device.synchronize()
        self.compile_s = (time.monotonic_ns() - start_ns) / 1e9
        self.graph_breaks = sum(counters["graph_break"].values())

    def __call__(self) -> None:
        self.step()

    def _compile(self, regions: ExitStack) -> None:
        counters.clear()
        try:
            self.step()
        except (UncapturedHigherOrderOpError, BackendCompilerFailed):
            # A region can't be left half-way, as a step can; and some code can't be traced in one, like
            # torchao's rounding of activations to FP8.
            regions.close()
            forget_compiled()
            counters.clear()
            self.step()


@contextmanager
def _tuned_apart_from_launches() -> Iterator[None]:
    """Let Inductor's tuner see how long a kernel takes, and not how long the host takes to launch it.

    It writes over the L2 cache between two runs, which on an H100 is done in 20 µs. Where Python needs longer
    for a launch, all kernels shorter than that look alike, and which is taken is chance.
    """
    benchmarker.L2_cache_size = FLUSH_BYTES
    try:
        yield
    finally:
        del benchmarker.L2_cache_size


def forget_compiled() -> None:
    """Free what torch.compile keeps."""
    torch._dynamo.reset()


def _backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
    table = {
        **decomposition.select_decomp_table(),
        torch.ops.aten.mm.default: _product,
        torch.ops.aten.addmm.default: _product_with_bias,
    }
    # This cache goes by the graph as it is before decomposition, so it could answer with other products than
    # ours. Inductor's own, which goes by what it is given to compile, stays on.
    with functorch_config.patch(enable_autograd_cache=False), _without_onednn():
        return compile_fx.compile_fx(graph, inputs, config_patches=INDUCTOR, decompositions=table)


@contextmanager
def _without_onednn() -> Iterator[None]:
    """Keep Inductor's patterns for oneDNN away, which is for CPUs.

    One takes INT8 weights on a GPU too, and calls `_weight_int8pack_mm`, which is slower than eager products.
    """
    enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = enabled


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
