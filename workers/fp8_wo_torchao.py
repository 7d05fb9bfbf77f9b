# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.11,<2.14", "transformers>=5.17,<6", "accelerate>=1.10", "gguf>=0.17", "torchao==0.18.*",
# ]
# [tool.qbench]
# precision = "fp8-wo"
# label = "FP8 weights (torchao)"
# bits_per_weight = 8
# devices = ["cpu", "cuda"]
# min_compute_capability = 8.9
# ///
"""FP8 weights only: E4M3 with a scale per output row, BF16 activations (torchao).

The bytes of `int8-wo`, with the spacing of floats: finer near zero, coarser far from it. Every linear layer
dequantizes its weight to BF16 and calls `matmul`, which is slower than BF16. On a GPU, small batches use the
same kernel as `int8-wo` instead.
"""

from schemas.job import Job
from workers.harness.main import main
from workers.protocol.backend import Backend, LoadedModel


def load(job: Job) -> LoadedModel:
    from torchao.quantization import Float8WeightOnlyConfig

    from workers.kernels.eight_bit_product import with_eight_bit_product
    from workers.quantization.torchao_model import load_torchao_model

    loaded = load_torchao_model(job, Float8WeightOnlyConfig())
    return loaded if job.device == "cpu" else with_eight_bit_product(loaded)


if __name__ == "__main__":
    main(Backend(load))
