"""Few rows times INT8 or FP8 weights, read as they are: `int8-wo` and `fp8-wo` at small batches.

cuBLAS takes no such weights beside BF16 rows, so for a matrix product they would be written out in BF16 at
every step. `eight_bit_product.cu` converts them in registers; else it works as `small_batch.py` tells. On an
H100 the seven products of a layer of Qwen2.5-7B take 96 µs for 8 rows of INT8 (`results/h100-table-7b`).
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torchao.quantization import Float8Tensor, Int8Tensor

from workers.kernels import small_batch
from workers.kernels.joint_linear import ATTENTION, join_linears, joined_linear
from workers.kernels.small_batch import (
    GROUP,
    RESERVED_SHARED_BYTES,
    ROWS_OF_A_BLOCK,
    aligned,
    kernel,
    properties,
)
from workers.protocol.backend import LoadedModel

OUTPUTS = 16
"""Of a block of threads."""
SOURCE = Path(__file__).with_suffix(".cu")


class Launch(NamedTuple):
    """How a product is shared out."""

    rows: int
    """Of the input, that a block of threads takes."""
    warps: int
    """Among which the groups of inputs are shared out."""
    stages: int
    """Groups that a warp has under way."""

    @property
    def shared_bytes(self) -> int:
        """Of a block of threads: inputs and weights of each group under way, the kernel's STAGE."""
        return self.warps * self.stages * (16 * self.rows + 8 * OUTPUTS) * 16


def plan(rows: int, blocks: int, gpu: Any) -> Launch:
    """The launch for `rows` times `blocks` of 16 outputs.

    By what was fast on an H100 for products of 0.5B, 7B and 14B shapes: up to 8 rows have twice the warps
    where not all blocks run at once. `gpu` is what torch says.
    """
    usual = Launch(min(rows, ROWS_OF_A_BLOCK), warps=4, stages=3)
    room = gpu.shared_memory_per_multiprocessor // (usual.shared_bytes + RESERVED_SHARED_BYTES)
    at_once = blocks <= room * gpu.multi_processor_count
    return usual if at_once or rows > 8 else usual._replace(warps=8, stages=2)


@torch.library.custom_op("qbench::eight_bit_product", mutates_args=())
def eight_bit_product(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """BF16 (rows, K) times INT8 or FP8 (N, K) with float32 scales (N,), to BF16 (rows, N).

    K is a multiple of 128, N of 16.
    """
    (rows, width), outputs, device = x.shape, weight.shape[0], x.device.index
    launch = plan(rows, outputs // OUTPUTS, properties(device))
    y = x.new_empty(rows, outputs)
    kernel(
        SOURCE,
        device,
        launch.shared_bytes,
        KO=width // GROUP,
        ROWS=launch.rows,
        WARPS=launch.warps,
        STAGES=launch.stages,
        FP8=int(weight.dtype != torch.int8),
    )(
        grid=(-(-rows // launch.rows), outputs // OUTPUTS, 1),
        block=(launch.warps * 32, 1, 1),
        args=[aligned(x), weight, scales, y, rows, outputs],
        shared_mem=launch.shared_bytes,
    )
    return y


@eight_bit_product.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def with_eight_bit_product(loaded: LoadedModel) -> LoadedModel:
    """`loaded`, its queries, keys and values joined, multiplying few rows by `eight_bit_product`.

    Gate and values are wide enough apart: for a prompt, all that is joined stands in memory in BF16 at once.
    """
    for kind in (Int8Tensor, Float8Tensor):
        small_batch.take_over(kind, _product, _fits)
    join_linears(loaded.model, torch.nn.Linear, _joined, [ATTENTION])
    return small_batch.told(loaded, SOURCE)


def _joined(layers: list[torch.nn.Linear]) -> torch.nn.Linear | None:
    weights: list[Any] = [layer.weight for layer in layers]
    if isinstance(weights[0], Float8Tensor):
        return joined_linear(layers, torch.cat(weights))
    if not isinstance(weights[0], Int8Tensor):
        return None
    # torchao has no `cat` of these.
    qdata = torch.cat([weight.qdata for weight in weights])
    scale = torch.cat([weight.scale for weight in weights])
    return joined_linear(layers, Int8Tensor(qdata, scale, weights[0].block_size, weights[0].dtype))


def _product(rows: torch.Tensor, weight: Any) -> torch.Tensor:
    return eight_bit_product(rows, weight.qdata, weight.scale.flatten().float())


def _fits(weight: Any) -> bool:
    weights_alone = weight.act_quant_kwargs is None and weight.scale.numel() == weight.shape[0]
    return weights_alone and weight.shape[0] % OUTPUTS == 0
