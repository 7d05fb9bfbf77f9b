"""Few rows times INT8 or FP8 weights, read as they are: `int8-wo` and `fp8-wo` beyond a single row.

cuBLAS takes no such weights beside BF16 rows, so for a matrix product they would be written out in BF16 at
every step. `workers/eight_bit_product.cu` converts them in registers and multiplies with tensor cores, which
take 8 rows at once; how it waits for memory is how `workers/int4_product.cu` does.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torchao.quantization import Float8Tensor, Int8Tensor

from workers.int4_product import ALIGNMENT, GROUP, MOST_ROWS, MOST_SHARED_BYTES, WARPS_OF_A_BLOCK

OUTPUTS = 16
"""Of a block of weights."""
SOURCE = Path(__file__).with_suffix(".cu")


class Launch(NamedTuple):
    """How a product is shared out; see `workers/int4_product.py`."""

    rows: int
    row_blocks: int
    warps: int
    stages: int
    blocks: int

    @property
    def shared_bytes(self) -> int:
        """Of a block of threads: inputs and weights of each group under way, the kernel's STAGE."""
        return self.warps * self.stages * (16 * self.rows + 128 * self.row_blocks) * 16


def plan(rows: int, groups: int) -> Launch:
    """Blocks of threads for 16 outputs, with as many warps as leave few of them idle."""
    most = min(groups, WARPS_OF_A_BLOCK // 2)
    evenly = [warps for warps in range(1, most + 1) if -(-groups // warps) * warps <= 1.05 * groups]
    launches = [Launch(rows, 1, warps, stages, 1) for warps in evenly for stages in (1, 2)]
    fitting = [launch for launch in launches if launch.shared_bytes <= MOST_SHARED_BYTES]
    return max(fitting, key=lambda launch: (launch.warps, launch.stages))


@torch.library.custom_op("qbench::eight_bit_product", mutates_args=())
def eight_bit_product(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """BF16 (rows, K) times INT8 or FP8 (N, K) with float32 scales (N,), to BF16 (rows, N).

    K is a multiple of 128, N of 16. Of rows there are at most 16.
    """
    (rows, width), outputs = x.shape, weight.shape[0]
    launch = plan(rows, width // GROUP)
    x = x.clone() if x.data_ptr() % ALIGNMENT else x
    y = x.new_empty(rows, outputs)
    _kernel(x.device.index, width // GROUP, int(weight.dtype != torch.int8), launch)(
        grid=(-(-outputs // (OUTPUTS * launch.row_blocks)), 1, 1),
        block=(launch.warps * 32, 1, 1),
        args=[x, weight, scales, y, outputs],
        shared_mem=launch.shared_bytes,
    )
    return y


@eight_bit_product.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@functools.cache
def _kernel(device: int, groups: int, fp8: int, launch: Launch) -> Any:
    names = ("KO", "FP8", "ROWS", "RB", "WARPS", "STAGES", "BLOCKS")
    defined = zip(names, (groups, fp8, *launch), strict=True)
    defines = "".join(f"#define {name} {value}\n" for name, value in defined)
    with torch.cuda.device(device):
        kernel = torch.cuda._compile_kernel(defines + SOURCE.read_text(), "eight_bit_product")
        kernel.set_shared_memory_config(launch.shared_bytes)
    return kernel


def take_over_few_rows() -> None:
    """Let torchao's INT8 and FP8 layers multiply 2 to 16 rows by `eight_bit_product`, where they can.

    A single row is left to the compiler, which fuses what comes before and after.
    """
    for kind in (Int8Tensor, Float8Tensor):
        _take_over(kind)


def _take_over(kind: Any) -> None:
    usual = kind._TORCH_FN_TABLE[kind][torch.nn.functional.linear]

    @kind.implements_torch_function(torch.nn.functional.linear)
    def linear(function: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
        x, weight, bias = (*args, *kwargs.values(), None)[:3]
        if not _fits(x, weight):
            return usual(function, types, args, kwargs)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y = eight_bit_product(rows, weight.qdata, weight.scale.flatten().float())
        y = y.reshape(*x.shape[:-1], weight.shape[0])
        return y if bias is None else y + bias


def _fits(x: torch.Tensor, weight: Any) -> bool:
    weights_alone = weight.act_quant_kwargs is None and weight.scale.numel() == weight.shape[0]
    shapes = (
        weight.shape[0] % OUTPUTS == 0 and weight.shape[1] % GROUP == 0 and weight.shape[1] == x.shape[-1]
    )
    few = x.shape[-2:-1].numel() == 1 and 1 < x.shape[:-1].numel() <= MOST_ROWS
    return weights_alone and shapes and few and x.dtype == torch.bfloat16
