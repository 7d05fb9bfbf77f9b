"""Small batches times INT8 or FP8 weights, converted in registers: what `int8-wo` and `fp8-wo` decode with.

cuBLAS can't combine such weights with BF16 rows, so a matrix product would write them to memory in BF16 at
every step. `eight_bit_product.cu` converts them in registers; otherwise it works as `small_batch.py`
describes. On an H100 the seven products of a layer of Qwen2.5-7B take 96 µs for 8 rows of INT8
(`results/h100-table-7b`).
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torchao.quantization import Float8Tensor, Int8Tensor

from workers.kernels import small_batch
from workers.kernels.merged_linear import ATTENTION, merge_linears, merged_linear
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

OUTPUTS = 16
"""Per thread block."""
SOURCE = Path(__file__).with_suffix(".cu")


class Launch(NamedTuple):
    """How a product is divided among thread blocks and warps."""

    rows: int
    """Rows of the input per thread block."""
    warps: int
    """Warps per thread block, which share the groups of inputs."""
    stages: int
    """Groups that a warp has in flight."""

    @property
    def shared_bytes(self) -> int:
        """Per thread block: inputs and weights of every group in flight, the kernel's STAGE."""
        return self.warps * self.stages * (16 * self.rows + 8 * OUTPUTS) * 16


def plan(rows: int, blocks: int, gpu: Gpu) -> Launch:
    """The launch for `rows` times `blocks` of 16 outputs.

    Chosen by what was fast on an H100 for products of 0.5B, 7B and 14B shapes: up to 8 rows get twice the
    warps if not all thread blocks run at once.
    """
    usual = Launch(min(rows, MAX_BLOCK_ROWS), warps=4, stages=3)
    resident = gpu.shared_bytes // (usual.shared_bytes + RESERVED_SHARED_BYTES)
    at_once = blocks <= resident * gpu.multiprocessors
    return usual if at_once or rows > 8 else usual._replace(warps=8, stages=2)


@functools.cache
def launcher(rows: int, width: int, outputs: int, fp8: bool, device: int) -> Callable[..., None]:
    """The kernel for these shapes, to be called with its `args`. Remembered, since every step asks for it."""
    launch = plan(rows, outputs // OUTPUTS, gpu_limits(device))
    kernel = compile_kernel(
        SOURCE,
        device,
        launch.shared_bytes,
        KO=width // GROUP,
        ROWS=launch.rows,
        WARPS=launch.warps,
        STAGES=launch.stages,
        FP8=int(fp8),
    )
    return functools.partial(
        kernel,
        grid=(-(-rows // launch.rows), outputs // OUTPUTS, 1),
        block=(launch.warps * 32, 1, 1),
        shared_mem=launch.shared_bytes,
    )


@torch.library.custom_op("qbench::eight_bit_product", mutates_args=())
def eight_bit_product(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """BF16 (rows, K) times INT8 or FP8 (N, K) with float32 scales (N,), to BF16 (rows, N).

    K is a multiple of 128, N of 16.
    """
    (rows, width), outputs = x.shape, weight.shape[0]
    launch = launcher(rows, width, outputs, weight.dtype != torch.int8, x.device.index)
    y = x.new_empty(rows, outputs)
    launch(args=[aligned(x), weight, scales, y, rows, outputs])
    return y


@eight_bit_product.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def with_eight_bit_product(loaded: LoadedModel) -> LoadedModel:
    """`loaded`, its queries, keys and values merged, multiplying small batches by `eight_bit_product`.

    The MLP's gate and up projections are wide enough to stay separate: for a prompt, everything that is
    merged is in memory in BF16 at the same time.
    """
    if torchao_only := small_batch.unavailable():
        return small_batch.with_kernel_setting(loaded, torchao_only)
    for kind in (Int8Tensor, Float8Tensor):
        small_batch.route_small_batches(kind, _product, _supports)
    merge_linears(loaded.model, torch.nn.Linear, _merged, [ATTENTION])
    return small_batch.with_kernel_setting(loaded, SOURCE.name)


def _merged(layers: list[torch.nn.Linear]) -> torch.nn.Linear | None:
    weights: list[Any] = [layer.weight for layer in layers]
    if isinstance(weights[0], Float8Tensor):
        return merged_linear(layers, torch.cat(weights))
    if not isinstance(weights[0], Int8Tensor):
        return None
    # torchao doesn't implement `cat` for these.
    qdata = torch.cat([weight.qdata for weight in weights])
    scale = torch.cat([weight.scale for weight in weights])
    return merged_linear(layers, Int8Tensor(qdata, scale, weights[0].block_size, weights[0].dtype))


def _product(rows: torch.Tensor, weight: Any) -> torch.Tensor:
    return eight_bit_product(rows, weight.qdata, weight.scale.flatten().float())


def _supports(weight: Any) -> bool:
    weight_only = weight.act_quant_kwargs is None and weight.scale.numel() == weight.shape[0]
    return weight_only and weight.shape[0] % OUTPUTS == 0
