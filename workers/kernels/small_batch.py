"""Shared by our small-batch kernels: which products they handle, and how a source becomes a kernel.

A decode step multiplies every weight by a few rows, one token of each sequence. Matrix kernels are built for
many rows, and those that accept quantized weights waste most of their time on a few. Our kernels keep several
reads in flight in every warp, and leave the products to tensor cores, which multiply 8 rows at once.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from workers.kernels.merged_linear import merged_setting
from workers.protocol.backend import LoadedModel

GROUP = 128
"""Inputs that a warp reads at once; in INT4, those that share a scale."""
MAX_ROWS = 64
"""Larger batches have not been measured."""
MAX_BLOCK_ROWS = 16
"""Per thread block. For 32 and 64 rows, blocks of 8 or 32 rows were no faster (one H100, manual run)."""
RESERVED_SHARED_BYTES = 1 << 10
"""Shared memory that CUDA reserves in each thread block."""
_SHARED_SOURCE = Path(__file__).with_suffix(".cuh")
_ALIGNMENT = 16
"""Bytes per read. The address must be a multiple of it."""


class Gpu(NamedTuple):
    """The limits that a launch is planned for."""

    multiprocessors: int
    shared_bytes: int
    """Shared memory per multiprocessor."""


def unavailable() -> str | None:
    """Why our kernels can't be compiled with this torch; None if they can.

    Its NVRTC compiler is a private part of torch. Without it torchao's own product runs: slower, but it is
    what the format offers everywhere else, and memory and quality can still be measured. A setting says so.
    """
    if hasattr(torch.cuda, "_compile_kernel"):
        return None
    return f"torchao's own product, because torch {torch.__version__} lacks torch.cuda._compile_kernel"


def route_small_batches(
    kind: Any, product: Callable[..., torch.Tensor], supports: Callable[[Any], bool]
) -> None:
    """Make linear layers with torchao weights of this `kind` multiply small batches with `product`.

    Rows have shape (rows, K) in BF16, one token of each sequence. Prompts stay with torchao, and so do
    weights that the kernel doesn't support.
    """
    torchao_linear = kind._TORCH_FN_TABLE[kind][torch.nn.functional.linear]

    @kind.implements_torch_function(torch.nn.functional.linear)
    def linear(function: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
        x, weight, bias = (*args, *kwargs.values(), None)[:3]
        if not (_is_small_batch(x) and x.shape[-1] == weight.shape[1] and supports(weight)):
            return torchao_linear(function, types, args, kwargs)
        y = product(x.reshape(-1, x.shape[-1]).contiguous(), weight).reshape(*x.shape[:-1], weight.shape[0])
        return y if bias is None else y + bias


def with_kernel_setting(loaded: LoadedModel, kernel: str) -> LoadedModel:
    """`loaded` with settings that name its small-batch kernel and the layers merged for it."""
    added = {"small_batch": kernel} | merged_setting(loaded.model)
    return loaded._replace(settings={**loaded.settings, **added})


def _is_small_batch(x: torch.Tensor) -> bool:
    one_token_each = x.shape[-2:-1].numel() == 1
    few_rows = x.shape[:-1].numel() <= MAX_ROWS
    return one_token_each and few_rows and x.dtype == torch.bfloat16 and x.shape[-1] % GROUP == 0


def aligned(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a copy of it if its address is not aligned for our kernels."""
    return x.clone() if x.data_ptr() % _ALIGNMENT else x


@functools.cache
def gpu_limits(device: int) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.multi_processor_count, properties.shared_memory_per_multiprocessor)


@functools.cache
def compile_kernel(source: Path, device: int, shared_bytes: int, **defines: int) -> Any:
    """The function named after its `source`, compiled by torch's NVRTC in a fraction of a second."""
    head = "".join(f"#define {name} {value}\n" for name, value in defines.items())
    text = head + _SHARED_SOURCE.read_text() + source.read_text()
    with torch.cuda.device(device):
        compiled = torch.cuda._compile_kernel(text, source.stem)
        compiled.set_shared_memory_config(shared_bytes)
    return compiled
