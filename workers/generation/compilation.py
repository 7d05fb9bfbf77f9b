"""torch.compile for a decode step of few rows: Inductor, told what such a step is.

With one row every linear layer is a matrix–vector product, which reads each weight once and multiplies it
once. Matrix kernels are made for many rows; a plain reduction reads faster. Inductor knows that, but
turns to it only for layers without bias and while it tunes each kernel by coordinate descent, which takes
longer than all the rest (cf. gpt-fast, "Accelerating Generative AI with PyTorch II", pytorch.org 2023).
Here all products of one row are reductions. Activations are written out before they are multiplied, since a
reduction would compute them again for every row of the weight. Long sums are made in two halves: there are
few of them, and a GPU ends them together only if it has many to share out. Each kernel takes the fastest of a
few ways to cut it into blocks. A few rows can be as many reductions in one kernel, which reads a weight once
for all of them. With more rows the products are cuBLAS's, and what lies between them is too little to tune.
Decoder layers share their kernels (`workers/generation/repeated_layers.py`).

Measured on one H100 80GB, Qwen2.5-7B: FP16 runs at 196 tok/s (`results/h100-table-7b`), and at 152 with
Inductor's own choice and tuning by coordinate descent (one run by hand). Two rows of FP16 run at 342 tok/s as
sums (`results/h100-table-7b`), and at 322 through cuBLAS (by hand).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor import compile_fx, decomposition
from torch._inductor.runtime.benchmarking import benchmarker

from workers.generation.device import Device
from workers.protocol.errors import Unsupported

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
INDUCTOR = {
    # Reads, and operations, beyond which an intermediate result is written out and not computed again: no
    # more than it takes to multiply by a dequantized weight.
    "realize_acc_reads_threshold": 3,
    "realize_opcount_threshold": 9,
    # One launch for small kernels that don't wait for each other, like the rotations of queries and keys.
    "combo_kernels": True,
}
LONG_SUM = 8192
"""Terms from which on a sum is made in two halves, and values of which the largest is found in two stages."""
PARTS = 256
"""Of such values, for each of which the first stage has a block of threads."""
MOST_SUMS = 16
"""Rows of a product beyond which its code would grow too long for sums."""
MOST_VARIANTS = 1024
"""Of a function for other arguments; beyond that torch.compile would go on uncompiled, without a word."""
FLUSH_BYTES = 1 << 28
"""Written by the tuner between two runs of a kernel: 0.1 ms, in which any host gets out the next launch."""


class CompiledStep:
    """A step compiled by running it once, and with it whatever is compiled when it is called."""

    def __init__(self, step: Callable[[], None], device: Device, compiled: Compile) -> None:
        self.step = compiled(step)
        counters.clear()
        start_ns = time.monotonic_ns()
        try:
            with _tuned_apart_from_launches(), dynamo_config.patch(recompile_limit=MOST_VARIANTS):
                self.step()
        except (TorchDynamoException, RuntimeError) as error:
            # Inductor's words and Triton's. What is wrong with a step may name torch.compiler, too.
            if "C++ compiler" in str(error) or "C compiler" in str(error):
                raise Unsupported(
                    "torch.compile finds no C++ compiler", "install g++, or leave compile out of --decode"
                ) from error
            raise
        device.synchronize()
        self.compile_s = (time.monotonic_ns() - start_ns) / 1e9
        self.graph_breaks = sum(counters["graph_break"].values())

    def __call__(self) -> None:
        self.step()


def compiler(device: Device, summed: bool) -> Compile:
    """torch.compile with all that is said above, its products `summed` where `device` is a GPU."""
    backend = partial(_for_gpu, summed=summed) if device.torch.type == "cuda" else _for_cpu
    return partial(torch.compile, backend=backend, dynamic=False)


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


def _for_cpu(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
    with _without_autograd_cache():
        return compile_fx.compile_fx(graph, inputs)


def _for_gpu(graph: torch.fx.GraphModule, inputs: list[torch.Tensor], summed: bool) -> Any:
    table = {**decomposition.select_decomp_table(), torch.ops.aten.argmax.default: _argmax}
    if summed:
        table |= {torch.ops.aten.mm.default: _product, torch.ops.aten.addmm.default: _product_with_bias}
    options = INDUCTOR | {"max_autotune_pointwise": summed}
    with _without_autograd_cache(), _without_onednn():
        return compile_fx.compile_fx(graph, inputs, config_patches=options, decompositions=table)


@contextmanager
def _without_autograd_cache() -> Iterator[None]:
    """Ask no cache that goes by the graph as Dynamo sees it, with torchao's layers and all products whole.

    It could answer with other products than ours. Inductor's own, which goes by what is compiled, stays on.
    """
    with functorch_config.patch(enable_autograd_cache=False):
        yield


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


def _product(vectors: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """(rows, k) × (k, n) as reductions that read the matrix together."""
    if vectors.shape[0] > MOST_SUMS:
        return NotImplemented
    if vectors.shape[0] == 1:
        return _product_of_one(vectors, matrix)
    # What is strided is written out before; else the terms could be, each of them.
    written = vectors.as_strided(vectors.shape, vectors.stride())
    return torch.cat([_product_of_one(vector, matrix) for vector in written.split(1)])


def _product_of_one(vector: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """(1, k) × (k, n), summed in float32 as a matrix product would be."""
    terms = vector.float().unsqueeze(2) * matrix.float().unsqueeze(0)
    count, sums = matrix.shape
    if count >= LONG_SUM and count % 2 == 0:
        terms = terms.view(2, count // 2, sums).sum(dim=1).unsqueeze(0)
    return terms.sum(dim=1).to(vector.dtype)


def _argmax(values: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> torch.Tensor:
    """Of a long last dimension, as a vocabulary is, in two stages.

    In one it is the work of a single block of threads: 28 of the 5,221 µs of a step of Qwen2.5-7B in FP16
    (`results/h100-best-7b`).
    """
    count = values.shape[-1] if values.dim() else 0
    if dim not in (-1, values.dim() - 1) or count < LONG_SUM or count % PARTS:
        return NotImplemented
    best, place = values.unflatten(-1, (PARTS, count // PARTS)).max(-1)
    part = best.argmax(-1, keepdim=True)
    found = part * (count // PARTS) + place.gather(-1, part)
    return found if keepdim else found.squeeze(-1)


def _product_with_bias(
    bias: torch.Tensor, vectors: torch.Tensor, matrix: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    product = _product(vectors, matrix) if beta == alpha == 1 else NotImplemented
    return product if product is NotImplemented else product + bias
