"""What NVIDIA publishes for its GPUs, to set beside what was measured: the measured figure is the roof.

Published rates are of dense matrices at boost clock. Where a data sheet gives the doubled rate of 2:4
sparsity, it is halved here. `float32` is the plain rate, not TF32's, as torch multiplies by default. GeForce
cards halve the rate of tensor cores that accumulate in float32, which is what torch lets them do for float16
and bfloat16; with float8 it depends on the kernel, so there is no figure.
"""

from schemas.record import Datasheet

TERA = 1e12


def find_datasheet(gpu_name: str) -> Datasheet | None:
    """The figures of a GPU by the name that the driver gives it; None for one that is not known."""
    return _DATASHEETS.get(gpu_name)


def _datasheet(source: str, read_tb_per_s: float, **tflop_per_s: float) -> Datasheet:
    return Datasheet(
        source=source,
        read_bytes_per_s=read_tb_per_s * TERA,
        matrix_flop_per_s={dtype: rate * TERA for dtype, rate in tflop_per_s.items()},
    )


def _ampere(source: str, read_tb_per_s: float) -> Datasheet:
    return _datasheet(source, read_tb_per_s, float32=19.5, float16=312, bfloat16=312, int8=624)


def _hopper(source: str, read_tb_per_s: float) -> Datasheet:
    return _datasheet(
        source, read_tb_per_s, float32=67, float16=989.5, bfloat16=989.5, int8=1979, float8_e4m3fn=1979
    )


_A100 = "NVIDIA A100 Tensor Core GPU, data sheet"
_H100 = "NVIDIA H100 Tensor Core GPU, data sheet"
_V100 = "NVIDIA V100 Tensor Core GPU, data sheet"
_GA102 = "NVIDIA Ampere GA102 GPU Architecture, whitepaper"

_DATASHEETS = {
    # Volta and Turing: no bfloat16, and on Volta no int8 in the tensor cores.
    "Tesla V100-SXM2-16GB": _datasheet(_V100, 0.9, float32=15.7, float16=125),
    "Tesla V100-SXM2-32GB": _datasheet(_V100, 0.9, float32=15.7, float16=125),
    "Tesla V100-PCIE-16GB": _datasheet(_V100, 0.9, float32=14, float16=112),
    "Tesla V100-PCIE-32GB": _datasheet(_V100, 0.9, float32=14, float16=112),
    "Tesla T4": _datasheet("NVIDIA T4 Tensor Core GPU, data sheet", 0.32, float32=8.1, float16=65, int8=130),
    # Ampere
    "NVIDIA A100-SXM4-40GB": _ampere(_A100, 1.555),
    "NVIDIA A100-SXM4-80GB": _ampere(_A100, 2.039),
    "NVIDIA A100-PCIE-40GB": _ampere(_A100, 1.555),
    "NVIDIA A100 80GB PCIe": _ampere(_A100, 1.935),
    "NVIDIA A10": _datasheet(
        "NVIDIA A10 Tensor Core GPU, data sheet", 0.6, float32=31.2, float16=125, bfloat16=125, int8=250
    ),
    "NVIDIA A10G": _datasheet(
        "NVIDIA A10G Tensor Core GPU, data sheet", 0.6, float16=70, bfloat16=70, int8=140
    ),
    "NVIDIA GeForce RTX 3090": _datasheet(_GA102, 0.936, float32=35.6, float16=71, bfloat16=71, int8=284),
    # Ada
    "NVIDIA L4": _datasheet(
        "NVIDIA L4 Tensor Core GPU, data sheet",
        0.3,
        float32=30.3,
        float16=121,
        bfloat16=121,
        int8=242.5,
        float8_e4m3fn=242.5,
    ),
    "NVIDIA L40S": _datasheet(
        "NVIDIA L40S GPU, data sheet",
        0.864,
        float32=91.6,
        float16=362.05,
        bfloat16=362.05,
        int8=733,
        float8_e4m3fn=733,
    ),
    "NVIDIA GeForce RTX 4090": _datasheet(
        "NVIDIA Ada GPU Architecture, whitepaper",
        1.008,
        float32=82.6,
        float16=165.2,
        bfloat16=165.2,
        int8=660.6,
    ),
    # Hopper
    "NVIDIA H100 80GB HBM3": _hopper(_H100, 3.35),
    "NVIDIA H100 PCIe": _datasheet(
        _H100, 2.0, float32=51, float16=756.5, bfloat16=756.5, int8=1513, float8_e4m3fn=1513
    ),
    "NVIDIA H100 NVL": _datasheet(
        _H100, 3.9, float32=60, float16=835.5, bfloat16=835.5, int8=1670.5, float8_e4m3fn=1670.5
    ),
    "NVIDIA H200": _hopper("NVIDIA H200 Tensor Core GPU, data sheet", 4.8),
    # Blackwell
    "NVIDIA GeForce RTX 5090": _datasheet(
        "NVIDIA RTX Blackwell GPU Architecture, whitepaper",
        1.792,
        float32=104.8,
        float16=209.5,
        bfloat16=209.5,
        int8=838,
    ),
}
