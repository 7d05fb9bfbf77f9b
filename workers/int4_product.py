"""Few rows times INT4 weights in the layout of torch's own kernel, but faster: `int4-wo` at small batches.

`_weight_int4pack_mm` multiplies up to 16 rows at once, and for one it draws under half of what the memory
of an H100 can deliver. Its time goes into waiting, so in `workers/int4_product.cu` every warp has several
reads under way, of weights that a layer has and not of those that pad its width. A tensor core takes 8 rows
at once, be there one or 8. What comes here are the steps of up to 16 sequences; prompts and more sequences go
to torch's kernel. On an H100 the seven products of a layer of Qwen2.5-7B take 58 µs for one row
(`results/h100-all-7b`); through torch's it was 88, and four more kernels to pad their inputs
(`results/h100-best-7b`).
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torchao.quantization import Int4TilePackedTo4dTensor

GROUP = 128
"""Inputs that share a scale. Rows are read in steps of as many."""
OUTPUTS = 8
"""Rows of weights that lie beside each other in this layout."""
ALIGNMENT = 16
"""Bytes that the kernel reads at once, from where their number divides the address."""
SOURCE = Path(__file__).with_suffix(".cu")
WARPS_OF_A_BLOCK = 32
MOST_ROWS = 16
MOST_SHARED_BYTES = 160 << 10
"""Of a block of threads on an A100; an H100 has more."""


class Launch(NamedTuple):
    """How a product is shared out."""

    rows: int
    """Of the input."""
    row_blocks: int
    """Blocks of 8 outputs that a block of threads computes."""
    warps: int
    """Among which the groups of inputs are shared out."""
    stages: int
    """Groups that a warp has under way."""
    blocks: int
    """Of threads that a multiprocessor is to have room for."""

    @property
    def shared_bytes(self) -> int:
        """Of a block of threads: inputs, scales and weights of each group under way, the kernel's STAGE."""
        return self.warps * self.stages * (16 * self.rows + 34 * self.row_blocks) * 16


def plan(rows: int, row_blocks: int, groups: int, multiprocessors: int) -> Launch:
    """The launch for `rows` times `row_blocks` blocks of 8 outputs with `groups` groups of inputs each.

    By the fastest of some 20 launches each of four shapes on an H100. Where outputs are few, 8 have all warps
    that a block of threads can have; else 16 have half as many, and a multiprocessor two such blocks. Several
    rows are read again by each block of threads: it then has twice the outputs, and a multiprocessor alone.
    """
    few = row_blocks < 2 * multiprocessors
    most = min(groups, WARPS_OF_A_BLOCK if few else WARPS_OF_A_BLOCK // 2)
    evenly = [warps for warps in range(1, most + 1) if -(-groups // warps) * warps <= 1.05 * groups]
    shared_out = (1, 4, 1) if few else (2, 2, 2) if rows == 1 else (4, 2, 1)
    launches = [
        Launch(rows, shared_out[0], warps, stages, shared_out[2])
        for warps in evenly
        for stages in range(1, min(shared_out[1], -(-groups // warps)) + 1)
    ]
    fitting = [launch for launch in launches if launch.shared_bytes * launch.blocks <= MOST_SHARED_BYTES]
    return max(fitting, key=lambda launch: (launch.warps, launch.stages))


@torch.library.custom_op("qbench::int4_product", mutates_args=())
def int4_product(x: torch.Tensor, weight: torch.Tensor, scale_and_zero: torch.Tensor) -> torch.Tensor:
    """BF16 (rows, K) times INT4 of shape (N / 8, groups, 32, 4) with BF16 (groups, N, 2), to BF16 (rows, N).

    K is a multiple of 128; groups beyond K / 128 are padding, and aren't read. Of rows there are at most 16.
    """
    row_blocks, stored = weight.shape[:2]
    groups, outputs = x.shape[1] // GROUP, row_blocks * OUTPUTS
    launch = plan(x.shape[0], row_blocks, groups, _multiprocessors(x.device.index))
    x = x.clone() if x.data_ptr() % ALIGNMENT else x
    y = x.new_empty(x.shape[0], outputs)
    _kernel(x.device.index, groups, stored, launch)(
        grid=(-(-row_blocks // launch.row_blocks), 1, 1),
        block=(launch.warps * 32, 1, 1),
        args=[x, weight, scale_and_zero, y, outputs],
        shared_mem=launch.shared_bytes,
    )
    return y


@int4_product.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, scale_and_zero: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] * OUTPUTS)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _kernel(device: int, groups: int, stored: int, launch: Launch) -> Any:
    """The kernel for one width, compiled by the NVRTC that comes with torch, in a fraction of a second."""
    names = ("KO", "KOP", "ROWS", "RB", "WARPS", "STAGES", "BLOCKS")
    defined = zip(names, (groups, stored, *launch), strict=True)
    defines = "".join(f"#define {name} {value}\n" for name, value in defined)
    with torch.cuda.device(device):
        kernel = torch.cuda._compile_kernel(defines + SOURCE.read_text(), "int4_product")
        kernel.set_shared_memory_config(launch.shared_bytes)
    return kernel


def take_over_few_rows() -> None:
    """Let torchao's INT4 layers multiply few rows by `int4_product`, where their shape is one for it."""
    functions = Int4TilePackedTo4dTensor._TORCH_FN_TABLE[Int4TilePackedTo4dTensor]
    usual = functions[torch.nn.functional.linear]

    @Int4TilePackedTo4dTensor.implements_torch_function(torch.nn.functional.linear)
    def linear(function: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
        x, weight, bias = (*args, *kwargs.values(), None)[:3]
        if not _fits(x, weight):
            return usual(function, types, args, kwargs)
        rows, outputs = x.reshape(-1, x.shape[-1]).contiguous(), weight.shape[0]
        y = int4_product(rows, weight.qdata, weight.scale_and_zero)[:, :outputs].reshape(
            *x.shape[:-1], outputs
        )
        return y if bias is None else y + bias


def _fits(x: torch.Tensor, weight: Int4TilePackedTo4dTensor) -> bool:
    plain = weight.block_size[-1] == GROUP and weight.act_pre_scale is None
    # A token of each sequence, and no prompts: every number of rows has a kernel of its own.
    few = x.shape[-2:-1].numel() == 1 and x.shape[:-1].numel() <= MOST_ROWS
    return (
        plain
        and few
        and x.shape[-1] == weight.shape[1]
        and x.dtype == torch.bfloat16
        and x.shape[-1] % GROUP == 0
    )
