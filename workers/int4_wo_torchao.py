# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.11,<2.14", "transformers>=5.17,<6", "accelerate>=1.10", "gguf>=0.17", "torchao==0.18.*",
# ]
# [tool.qbench]
# precision = "int4-wo"
# label = "INT4 weights (torchao)"
# bits_per_weight = 4.25
# devices = ["cuda"]
# min_compute_capability = 8.0
# ///
"""INT4 weights only: 4 bits in groups of 128, rounded to nearest, BF16 activations (torchao).

Stores packed INT4 in tiles, with a BF16 scale and zero point per group; input widths are padded to multiples
of 1024. torch's `_weight_int4pack_mm` dequantizes in registers while it multiplies, in every decode mode.
Batches of up to 64 rows use our own kernel, which reads weights faster (`workers/kernels/int4_product.py`).
It is fastest for memory-bound work at small batches, at some loss of quality, since nothing is calibrated.
"""

from schemas.job import Job
from workers.harness.main import main
from workers.protocol.backend import Backend, LoadedModel


def load(job: Job) -> LoadedModel:
    from torchao.quantization import Int4WeightOnlyConfig

    from workers.kernels.int4_product import with_int4_product
    from workers.kernels.small_batch import GROUP
    from workers.quantization.torchao_model import load_torchao_model

    # The layout of torch's own kernel; torchao's default layout needs an extra package of kernels.
    config = Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
    return with_int4_product(load_torchao_model(job, config))


if __name__ == "__main__":
    main(Backend(load))
