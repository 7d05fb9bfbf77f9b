# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.11,<2.14", "transformers>=5.17,<6", "accelerate>=1.10", "gguf>=0.17", "torchao==0.18.*",
# ]
# [tool.qbench]
# precision = "int8-wo"
# label = "INT8 weights (torchao)"
# bits_per_weight = 8
# devices = ["cpu", "cuda"]
# min_compute_capability = 8.0
# ///
"""INT8 weights only: 8 bits with a scale per output row, BF16 activations (torchao).

Every linear layer converts its weight to BF16, multiplies with torch's `mm`, and then applies the scales.
That writes the converted weight to memory at every step, which is slower than BF16. On a GPU, batches of up
to 64 rows use our own kernel instead, which converts in registers (`workers/kernels/eight_bit_product.py`).
So it is faster than BF16 for memory-bound work at small batches.
"""

from schemas.job import Job
from workers.harness.main import main
from workers.protocol.backend import Backend, LoadedModel


def load(job: Job) -> LoadedModel:
    from torchao.quantization import Int8WeightOnlyConfig

    from workers.kernels.eight_bit_product import with_eight_bit_product
    from workers.quantization.torchao_model import load_torchao_model

    loaded = load_torchao_model(job, Int8WeightOnlyConfig())
    return loaded if job.device == "cpu" else with_eight_bit_product(loaded)


if __name__ == "__main__":
    main(Backend(load))
