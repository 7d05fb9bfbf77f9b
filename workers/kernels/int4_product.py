"""Few rows times INT4 weights in the layout of torch's own kernel, but faster: `int4-wo` at small batches.

`_weight_int4pack_mm` draws under half of what the memory of an H100 can deliver for one row, and for 8 takes
twice as long (by hand). Its time goes into waiting; `int4_product.cu` works as `small_batch.py` tells, on
weights that a layer has and not on those that pad its width. On an H100 the seven products of a layer of
Qwen2.5-7B take 52 µs for one row (`results/h100-table-7b`); through torch's it was 88, and four more kernels
to pad their inputs (`results/h100-best-7b`).
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torchao.quantization import Int4TilePackedTo4dTensor

from workers.kernels import small_batch
from workers.kernels.joint_linear import join_linears, joined_linear
from workers.kernels.small_batch import (
    GROUP,
    RESERVED_SHARED_BYTES,
    ROWS_OF_A_BLOCK,
    aligned,
    kernel,
    properties,
)
from workers.protocol.backend import LoadedModel

OUTPUTS = 8
"""Rows of weights that lie beside each other in this layout."""
SOURCE = Path(__file__).with_suffix(".cu")
WARPS = 16
"""Of a multiprocessor at most, be they one block of threads or several."""


class Launch(NamedTuple):
    """How a product is shared out."""

    rows: int
    """Of the input, that a block of threads takes."""
    row_blocks: int
    """Blocks of 8 outputs that it computes."""
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


def plan(rows: int, row_blocks: int, groups: int, gpu: Any) -> Launch:
    """The launch for `rows` times `row_blocks` blocks of 8 outputs with `groups` groups of inputs each.

    By what was fast on an H100 for products of 0.5B, 7B and 14B shapes. A warp has at least four groups where
    there are enough. Where outputs are few, every 8 have a block of threads; else 32, which share inputs;
    40 where all blocks then run at once, and where both rows and outputs are many. `gpu` is what torch says.
    """
    of_a_multiprocessor = row_blocks / gpu.multi_processor_count
    few = of_a_multiprocessor < 2
    most = 5 if 4 < of_a_multiprocessor <= 5 or (rows >= 8 and of_a_multiprocessor > 8) else 4
    rounds = -(-groups // min(max(groups // 4, WARPS // 2), WARPS))
    warps = -(-groups // rounds)
    launches = [
        Launch(min(rows, ROWS_OF_A_BLOCK), each, warps, stages, blocks)
        for each in ([1] if few else range(4, most + 1))
        for stages in range(1, min(4 if few else 2, rounds) + 1)
        for blocks in range(1, WARPS // warps + 1)
    ]
    room = gpu.shared_memory_per_multiprocessor
    fitting = [each for each in launches if each.blocks * (each.shared_bytes + RESERVED_SHARED_BYTES) <= room]
    return max(fitting, key=lambda launch: (launch.row_blocks, launch.blocks, launch.stages))


@torch.library.custom_op("qbench::int4_product", mutates_args=())
def int4_product(x: torch.Tensor, weight: torch.Tensor, scale_and_zero: torch.Tensor) -> torch.Tensor:
    """BF16 (rows, K) times INT4 of shape (N / 8, groups, 32, 4) with BF16 (groups, N, 2), to BF16 (rows, N).

    K is a multiple of 128; groups beyond K / 128 are padding, and aren't read.
    """
    (rows, width), (row_blocks, stored) = x.shape, weight.shape[:2]
    groups, outputs, device = width // GROUP, row_blocks * OUTPUTS, x.device.index
    launch = plan(rows, row_blocks, groups, properties(device))
    y = x.new_empty(rows, outputs)
    kernel(
        SOURCE,
        device,
        launch.shared_bytes,
        KO=groups,
        KOP=stored,
        ROWS=launch.rows,
        RB=launch.row_blocks,
        WARPS=launch.warps,
        STAGES=launch.stages,
        BLOCKS=launch.blocks,
    )(
        grid=(-(-rows // launch.rows), -(-row_blocks // launch.row_blocks), 1),
        block=(launch.warps * 32, 1, 1),
        args=[aligned(x), weight, scale_and_zero, y, rows, outputs],
        shared_mem=launch.shared_bytes,
    )
    return y


@int4_product.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, scale_and_zero: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] * OUTPUTS)


def with_int4_product(loaded: LoadedModel) -> LoadedModel:
    """`loaded`, its INT4 layers of one input joined, multiplying few rows by `int4_product`."""
    small_batch.take_over(Int4TilePackedTo4dTensor, _product, _fits)
    join_linears(loaded.model, torch.nn.Linear, _joined)
    return small_batch.told(loaded, SOURCE)


def _joined(layers: list[torch.nn.Linear]) -> torch.nn.Linear | None:
    weights: list[Any] = [layer.weight for layer in layers]
    # What pads the outputs of one layer would lie between them and those of the next.
    if not isinstance(weights[0], Int4TilePackedTo4dTensor) or any(len(each) % OUTPUTS for each in weights):
        return None
    qdata = torch.cat([weight.qdata for weight in weights])
    scale_and_zero = torch.cat([weight.scale_and_zero for weight in weights], dim=1)
    shape = torch.Size([sum(len(weight) for weight in weights), weights[0].shape[1]])
    joint = Int4TilePackedTo4dTensor(qdata, scale_and_zero, weights[0].block_size, shape)
    return joined_linear(layers, joint)


def _product(rows: torch.Tensor, weight: Int4TilePackedTo4dTensor) -> torch.Tensor:
    return int4_product(rows, weight.qdata, weight.scale_and_zero)[:, : weight.shape[0]]


def _fits(weight: Int4TilePackedTo4dTensor) -> bool:
    return weight.block_size[-1] == GROUP and weight.act_pre_scale is None
