"""torch.compile for a decode step: Inductor, configured for matrix products with very few rows.

At batch 1 every linear layer is a matrix-vector product, which reads each weight once and multiplies it once.
GEMM kernels are built for many rows; a plain reduction reads memory faster. Inductor knows this, but uses
reductions only for layers without bias, and only while it tunes each kernel by coordinate descent, which
takes longer than all other compilation (cf. gpt-fast, "Accelerating Generative AI with PyTorch II",
pytorch.org 2023). So our decompositions (`workers/generation/decompositions.py`) turn every product of few
rows into reductions. Activations are written to memory before they are multiplied, because a reduction would
recompute them for every row of the weight. Long sums are split in two: they are few, and only many thread
blocks keep a GPU evenly busy. Each kernel uses the fastest of a few block shapes. Larger batches use cuBLAS,
and the work between its calls is too small to be worth tuning. Decoder layers share their kernels
(`workers/generation/repeated_layers.py`).

Measured on one H100 80GB, Qwen2.5-7B: FP16 decodes at 196 tok/s (`results/h100-table-7b`), and at 152 with
Inductor's own choice tuned by coordinate descent (one manual run). Two rows of FP16 decode at 342 tok/s as
reductions (`results/h100-table-7b`), and at 322 through cuBLAS (manual run).

This module uses private parts of torch. Only the `compile` mode imports it, through
`workers/generation/modes.py`, so that a rename in a later torch fails only that mode's rows.
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
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime.benchmarking import benchmarker

from workers.generation.decompositions import addmm_as_reductions, mm_as_reductions, two_stage_argmax
from workers.generation.device import Device
from workers.protocol.errors import Unsupported

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
INDUCTOR = {
    # Reads and operations beyond which Inductor materializes an intermediate instead of recomputing it: just
    # enough to multiply by a dequantized weight.
    "realize_acc_reads_threshold": 3,
    "realize_opcount_threshold": 9,
    # One launch for small independent kernels, such as the rotary embeddings of queries and keys.
    "combo_kernels": True,
}
RECOMPILE_LIMIT = 1024
"""Variants of a function for different arguments. Beyond it torch.compile silently falls back to eager."""
FLUSH_BYTES = 1 << 28
"""Written by the tuner between two runs of a kernel: 0.1 ms, enough for any host to issue a launch."""

# Missing options raise here rather than in the middle of a compilation, where torch would wrap the error.
for _config, _option in [
    (dynamo_config, "recompile_limit"),
    (functorch_config, "enable_autograd_cache"),
    *((inductor_config, name) for name in [*INDUCTOR, "max_autotune_pointwise"]),
]:
    getattr(_config, _option)


class CompiledStep:
    """A decode step, compiled by running it once together with everything it calls."""

    def __init__(self, step: Callable[[], None], device: Device, compile_function: Compile) -> None:
        self.step = compile_function(step)
        counters.clear()
        start_ns = time.monotonic_ns()
        try:
            with _tuning_without_launch_overhead(), dynamo_config.patch(recompile_limit=RECOMPILE_LIMIT):
                self.step()
        except (TorchDynamoException, RuntimeError) as error:
            # Messages of Inductor and of Triton. Other errors may mention torch.compiler.
            if "C++ compiler" in str(error) or "C compiler" in str(error):
                raise Unsupported(
                    "torch.compile needs a C++ compiler, and there is none",
                    "install g++, or leave compile out of --decode",
                ) from error
            raise
        device.synchronize()
        self.compile_s = (time.monotonic_ns() - start_ns) / 1e9
        self.graph_breaks = sum(counters["graph_break"].values())

    def __call__(self) -> None:
        self.step()


def compiler(device: Device, gemv: bool) -> Compile:
    """torch.compile as described above. `gemv` turns products into reductions, on a GPU."""
    backend = partial(_compile_for_gpu, gemv=gemv) if device.torch.type == "cuda" else _compile_for_cpu
    return partial(torch.compile, backend=backend, dynamic=False)


def forget_compiled() -> None:
    """Free everything torch.compile keeps."""
    torch.compiler.reset()


@contextmanager
def _tuning_without_launch_overhead() -> Iterator[None]:
    """Make Inductor's tuner measure how long a kernel runs, not how long the host takes to launch it.

    The tuner flushes the L2 cache between two runs, which takes 20 µs on an H100. If Python needs longer than
    that for a launch, all shorter kernels appear equally fast, and the choice among them is random.
    """
    benchmarker.L2_cache_size = FLUSH_BYTES
    try:
        yield
    finally:
        del benchmarker.L2_cache_size


def _compile_for_cpu(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
    with _without_autograd_cache():
        return compile_fx(graph, inputs)


def _compile_for_gpu(graph: torch.fx.GraphModule, inputs: list[torch.Tensor], gemv: bool) -> Any:
    table = {**select_decomp_table(), torch.ops.aten.argmax.default: two_stage_argmax}
    if gemv:
        table |= {
            torch.ops.aten.mm.default: mm_as_reductions,
            torch.ops.aten.addmm.default: addmm_as_reductions,
        }
    options = INDUCTOR | {"max_autotune_pointwise": gemv}
    with _without_autograd_cache(), _without_onednn():
        return compile_fx(graph, inputs, config_patches=options, decompositions=table)


@contextmanager
def _without_autograd_cache() -> Iterator[None]:
    """Disable the cache keyed by the graph as Dynamo sees it, before torchao's layers and products decompose.

    It could return code built with other decompositions. Inductor's own cache, keyed by what is compiled,
    stays enabled.
    """
    with functorch_config.patch(enable_autograd_cache=False):
        yield


@contextmanager
def _without_onednn() -> Iterator[None]:
    """Disable Inductor's patterns for oneDNN, which is a CPU library.

    One of them matches INT8 weights on a GPU too, and calls `_weight_int8pack_mm`, which is slower than the
    eager product.
    """
    enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = enabled
