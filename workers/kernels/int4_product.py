"""Small batches times INT4 weights in torch's own layout, but faster: what `int4-wo` decodes with.

`_weight_int4pack_mm` uses less than half of an H100's memory bandwidth for one row, and takes twice as long
for 8 (manual run). It spends its time waiting; `int4_product.cu` works as `small_batch.py` describes, and
skips the weights that pad a layer's width. On an H100 the seven products of a layer of Qwen2.5-7B take 52 µs
for one row (`results/h100-table-7b`); with torch's kernel they took 88, plus four kernels to pad their inputs
(`results/h100-best-7b`).
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torchao.quantization import Int4TilePackedTo4dTensor

from workers.kernels import small_batch
from workers.kernels.merged_linear import merge_linears, merged_linear
from workers.kernels.small_batch import (
    GROUP,
    MAX_BLOCK_ROWS,
    RESERVED_SHARED_BYTES,
    Gpu,
    aligned,
    compile_kernel,
    gpu_limits,
)
from workers.protocol.backend import LoadedModel

OUTPUTS = 8
"""Rows of weights that this layout interleaves."""
SOURCE = Path(__file__).with_suffix(".cu")
MAX_WARPS = 16
"""Per multiprocessor, in one or several thread blocks."""


class Launch(NamedTuple):
    """How a product is divided among thread blocks and warps."""

    rows: int
    """Rows of the input per thread block."""
    row_blocks: int
    """Blocks of 8 outputs per thread block."""
    warps: int
    """Warps per thread block, which share the groups of inputs."""
    stages: int
    """Groups that a warp has in flight."""
    blocks: int
    """Thread blocks that must fit on a multiprocessor."""

    @property
    def shared_bytes(self) -> int:
        """Per thread block: inputs, scales and weights of every group in flight, the kernel's STAGE."""
        return self.warps * self.stages * (16 * self.rows + 34 * self.row_blocks) * 16


def plan(rows: int, row_blocks: int, groups: int, gpu: Gpu) -> Launch:
    """The launch for `rows` times `row_blocks` blocks of 8 outputs with `groups` groups of inputs each.

    Chosen by what was fast on an H100 for products of 0.5B, 7B and 14B shapes. A warp gets at least four
    groups if there are enough. If outputs are few, every 8 get a thread block; otherwise every 32, which
    share inputs, or every 40 if all thread blocks then run at once, or if there are many rows and many
    outputs.
    """
    per_multiprocessor = row_blocks / gpu.multiprocessors
    few = per_multiprocessor < 2
    most = 5 if 4 < per_multiprocessor <= 5 or (rows >= 8 and per_multiprocessor > 8) else 4
    rounds = -(-groups // min(max(groups // 4, MAX_WARPS // 2), MAX_WARPS))
    warps = -(-groups // rounds)
    launches = [
        Launch(min(rows, MAX_BLOCK_ROWS), each, warps, stages, blocks)
        for each in ([1] if few else range(4, most + 1))
        for stages in range(1, min(4 if few else 2, rounds) + 1)
        for blocks in range(1, MAX_WARPS // warps + 1)
    ]
    fitting = [
        each
        for each in launches
        if each.blocks * (each.shared_bytes + RESERVED_SHARED_BYTES) <= gpu.shared_bytes
    ]
    return max(fitting, key=lambda launch: (launch.row_blocks, launch.blocks, launch.stages))


@functools.cache
def launcher(rows: int, row_blocks: int, groups: int, stored_groups: int, device: int) -> Callable[..., None]:
    """The kernel for these shapes, to be called with its `args`. Remembered, since every step asks for it."""
    launch = plan(rows, row_blocks, groups, gpu_limits(device))
    kernel = compile_kernel(
        SOURCE,
        device,
        launch.shared_bytes,
        KO=groups,
        KOP=stored_groups,
        ROWS=launch.rows,
        RB=launch.row_blocks,
        WARPS=launch.warps,
        STAGES=launch.stages,
        BLOCKS=launch.blocks,
    )
    return functools.partial(
        kernel,
        grid=(-(-rows // launch.rows), -(-row_blocks // launch.row_blocks), 1),
        block=(launch.warps * 32, 1, 1),
        shared_mem=launch.shared_bytes,
    )


@torch.library.custom_op("qbench::int4_product", mutates_args=())
def int4_product(x: torch.Tensor, weight: torch.Tensor, scale_and_zero: torch.Tensor) -> torch.Tensor:
    """BF16 (rows, K) times INT4 of shape (N / 8, groups, 32, 4) with BF16 (groups, N, 2), to BF16 (rows, N).

    K is a multiple of 128; groups beyond K / 128 are padding and are not read.
    """
    (rows, width), (row_blocks, stored_groups) = x.shape, weight.shape[:2]
    outputs = row_blocks * OUTPUTS
    launch = launcher(rows, row_blocks, width // GROUP, stored_groups, x.device.index)
    y = x.new_empty(rows, outputs)
    launch(args=[aligned(x), weight, scale_and_zero, y, rows, outputs])
    return y


@int4_product.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, scale_and_zero: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] * OUTPUTS)


def with_int4_product(loaded: LoadedModel) -> LoadedModel:
    """`loaded`, its INT4 layers of the same input merged, multiplying small batches by `int4_product`."""
    if torchao_only := small_batch.unavailable():
        return small_batch.with_kernel_setting(loaded, torchao_only)
    small_batch.route_small_batches(Int4TilePackedTo4dTensor, _product, _supports)
    merge_linears(loaded.model, torch.nn.Linear, _merged)
    return small_batch.with_kernel_setting(loaded, SOURCE.name)


def _merged(layers: list[torch.nn.Linear]) -> torch.nn.Linear | None:
    weights: list[Any] = [layer.weight for layer in layers]
    # The padding of one layer's outputs would end up between them and those of the next.
    if not isinstance(weights[0], Int4TilePackedTo4dTensor) or any(len(each) % OUTPUTS for each in weights):
        return None
    qdata = torch.cat([weight.qdata for weight in weights])
    scale_and_zero = torch.cat([weight.scale_and_zero for weight in weights], dim=1)
    shape = torch.Size([sum(len(weight) for weight in weights), weights[0].shape[1]])
    merged = Int4TilePackedTo4dTensor(qdata, scale_and_zero, weights[0].block_size, shape)
    return merged_linear(layers, merged)


def _product(rows: torch.Tensor, weight: Int4TilePackedTo4dTensor) -> torch.Tensor:
    return int4_product(rows, weight.qdata, weight.scale_and_zero)[:, : weight.shape[0]]


def _supports(weight: Int4TilePackedTo4dTensor) -> bool:
    return weight.block_size[-1] == GROUP and weight.act_pre_scale is None
