"""Few rows times INT8 or FP8 weights, read as they are: `int8-wo` and `fp8-wo` at small batches.

cuBLAS takes no such weights beside BF16 rows, so for a matrix product they would be written out in BF16 at
every step. `workers/eight_bit_product.cu` converts them in registers; else it works as `workers/few_rows.py`
tells. On an H100 the seven products of a layer of Qwen2.5-7B take 106 µs for 8 rows of INT8
(`results/h100-table-7b`).
"""

from pathlib import Path
from typing import Any

import torch
from torchao.quantization import Float8Tensor, Int8Tensor

from workers import few_rows
from workers.few_rows import GROUP, ROWS_OF_A_BLOCK, aligned, kernel
from workers.joint_linear import ATTENTION, join_linears
from workers.protocol import LoadedModel

OUTPUTS = 16
"""Of a block of threads."""
WARPS, STAGES = 4, 3
"""Of a block of threads, and groups of inputs that a warp has under way: by what was fast among 50 to 75
launches each of four shapes on an H100, for 2 to 16 rows."""
SOURCE = Path(__file__).with_suffix(".cu")


@torch.library.custom_op("qbench::eight_bit_product", mutates_args=())
def eight_bit_product(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """BF16 (rows, K) times INT8 or FP8 (N, K) with float32 scales (N,), to BF16 (rows, N).

    K is a multiple of 128, N of 16.
    """
    (rows, width), outputs = x.shape, weight.shape[0]
    rows_of_a_block, groups = min(rows, ROWS_OF_A_BLOCK), width // GROUP
    shared_bytes = WARPS * STAGES * (16 * rows_of_a_block + 8 * OUTPUTS) * 16  # the kernel's STAGE
    y = x.new_empty(rows, outputs)
    kernel(
        SOURCE,
        x.device.index,
        shared_bytes,
        KO=groups,
        ROWS=rows_of_a_block,
        WARPS=WARPS,
        STAGES=STAGES,
        FP8=int(weight.dtype != torch.int8),
    )(
        grid=(-(-rows // rows_of_a_block), outputs // OUTPUTS, 1),
        block=(WARPS * 32, 1, 1),
        args=[aligned(x), weight, scales, y, rows, outputs],
        shared_mem=shared_bytes,
    )
    return y


@eight_bit_product.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def with_eight_bit_product(loaded: LoadedModel) -> LoadedModel:
    """`loaded`, its queries, keys and values joined, multiplying few rows by `eight_bit_product`.

    A single row is left to torch.compile where that is at work: it fuses what comes before and after. Gate
    and values are wide enough, and for a prompt all that is joined stands in memory in BF16 at once.
    """
    for kind in (Int8Tensor, Float8Tensor):
        few_rows.take_over(kind, _product, _fits)
    join_linears(loaded.model, torch.nn.Linear, _joined, [ATTENTION])
    return few_rows.told(loaded, SOURCE)


def _joined(layers: list[torch.nn.Linear]) -> torch.nn.Linear | None:
    weights: list[Any] = [layer.weight for layer in layers]
    if isinstance(weights[0], Float8Tensor):
        return few_rows.linear(layers, torch.cat(weights))
    if not isinstance(weights[0], Int8Tensor):
        return None
    qdata = torch.cat([weight.qdata for weight in weights])
    scale = torch.cat([weight.scale for weight in weights])
    return few_rows.linear(layers, Int8Tensor(qdata, scale, weights[0].block_size, weights[0].dtype))


def _product(rows: torch.Tensor, weight: Any) -> torch.Tensor:
    return eight_bit_product(rows, weight.qdata, weight.scale.flatten().float())


def _fits(rows: torch.Tensor, weight: Any) -> bool:
    weights_alone = weight.act_quant_kwargs is None and weight.scale.numel() == weight.shape[0]
    # While torch.compile looks on, tensors are stand-ins. `is_compiling` says so from torch 2.13 on alone.
    left_to_compiler = len(rows) == 1 and type(rows) is not torch.Tensor
    return weights_alone and weight.shape[0] % OUTPUTS == 0 and not left_to_compiler
