"""What our kernels for few rows share: which inputs are theirs, and how a source becomes a kernel.

A step of decoding multiplies every weight by few rows, a token of each sequence. Matrix kernels are made for
many, and those that take quantized weights waste most of the time on a few. Ours have several reads under way
in every warp, and leave the products to tensor cores, which take 8 rows at once.
"""

import functools
from pathlib import Path
from typing import Any

import torch

GROUP = 128
"""Inputs that a warp reads at once."""
MOST_ROWS = 64
"""Beyond which torch's kernels are no slower."""
ROWS_OF_A_BLOCK = 16
"""At most. Blocks of threads that differ in their rows alone find each other's weights in the L2 cache."""
_ALIGNMENT = 16
"""Bytes that are read at once, from where their number divides the address."""


def is_few_rows(x: torch.Tensor) -> bool:
    """Whether `x`, (…, K), is a token of each of a few sequences: prompts are left to torch."""
    one_each = x.shape[-2:-1].numel() == 1 and x.shape[:-1].numel() <= MOST_ROWS
    return one_each and x.dtype == torch.bfloat16 and x.shape[-1] % GROUP == 0


def aligned(x: torch.Tensor) -> torch.Tensor:
    return x.clone() if x.data_ptr() % _ALIGNMENT else x


@functools.cache
def properties(device: int) -> Any:
    return torch.cuda.get_device_properties(device)


@functools.cache
def kernel(source: Path, device: int, shared_bytes: int, **defines: int) -> Any:
    """The function named like its `source`, compiled by the NVRTC that comes with torch in half a second."""
    head = "".join(f"#define {name} {value}\n" for name, value in defines.items())
    with torch.cuda.device(device):
        compiled = torch.cuda._compile_kernel(head + source.read_text(), source.stem)
        compiled.set_shared_memory_config(shared_bytes)
    return compiled
