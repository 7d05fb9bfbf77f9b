"""What our kernels for few rows share: which products are theirs, and how a source becomes a kernel.

A step of decoding multiplies every weight by few rows, a token of each sequence. Matrix kernels are made for
many, and those that take quantized weights waste most of the time on a few. Ours have several reads under way
in every warp, and leave the products to tensor cores, which take 8 rows at once.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from workers.kernels.joint_linear import joined_setting
from workers.protocol.backend import LoadedModel

GROUP = 128
"""Inputs that a warp reads at once; of INT4 those that share a scale."""
MOST_ROWS = 64
"""More have not been measured."""
ROWS_OF_A_BLOCK = 16
"""At most. For 32 and 64 rows, blocks of threads with 8 or with 32 were no faster (one H100, by hand)."""
RESERVED_SHARED_BYTES = 1 << 10
"""Of a block of threads, for CUDA."""
_SHARED_SOURCE = Path(__file__).with_suffix(".cuh")
_ALIGNMENT = 16
"""Bytes that are read at once, from where their number divides the address."""


def take_over(kind: Any, product: Callable[..., torch.Tensor], fits: Callable[[Any], bool]) -> None:
    """Let linear layers with torchao's weights of this `kind` multiply few rows by `product(rows, weight)`.

    Their rows are of shape (rows, K) in BF16, a token of each sequence. Prompts are left to torch, and so are
    weights that don't fit.
    """
    usual = kind._TORCH_FN_TABLE[kind][torch.nn.functional.linear]

    @kind.implements_torch_function(torch.nn.functional.linear)
    def linear(function: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
        x, weight, bias = (*args, *kwargs.values(), None)[:3]
        if not (_has_few_rows(x) and x.shape[-1] == weight.shape[1] and fits(weight)):
            return usual(function, types, args, kwargs)
        y = product(x.reshape(-1, x.shape[-1]).contiguous(), weight).reshape(*x.shape[:-1], weight.shape[0])
        return y if bias is None else y + bias


def told(loaded: LoadedModel, source: Path) -> LoadedModel:
    """`loaded`, whose settings name the kernel of few rows and what it multiplies at once."""
    of_few_rows = {"small_batch": source.name} | joined_setting(loaded.model)
    return loaded._replace(settings={**loaded.settings, **of_few_rows})


def _has_few_rows(x: torch.Tensor) -> bool:
    one_of_each = x.shape[-2:-1].numel() == 1
    few = x.shape[:-1].numel() <= MOST_ROWS
    return one_of_each and few and x.dtype == torch.bfloat16 and x.shape[-1] % GROUP == 0


def aligned(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a copy of it at an address that our kernels can read from."""
    return x.clone() if x.data_ptr() % _ALIGNMENT else x


@functools.cache
def properties(device: int) -> Any:
    """What torch tells of a GPU, asked once."""
    return torch.cuda.get_device_properties(device)


@functools.cache
def kernel(source: Path, device: int, shared_bytes: int, **defines: int) -> Any:
    """The function named like its `source`, compiled by torch's NVRTC in a fraction of a second."""
    head = "".join(f"#define {name} {value}\n" for name, value in defines.items())
    text = head + _SHARED_SOURCE.read_text() + source.read_text()
    with torch.cuda.device(device):
        compiled = torch.cuda._compile_kernel(text, source.stem)
        compiled.set_shared_memory_config(shared_bytes)
    return compiled
