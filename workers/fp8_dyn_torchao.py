# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.11,<2.14", "transformers>=5.17,<6", "accelerate>=1.10", "gguf>=0.17", "torchao==0.18.*",
# ]
# [tool.qbench]
# precision = "fp8-dyn"
# label = "FP8 dynamic (torchao)"
# bits_per_weight = 8
# devices = ["cuda"]
# min_compute_capability = 8.9
# ///
"""FP8 weights and activations: E4M3 for both, with a scale per row (torchao, W8A8).

Stores what `fp8-wo` does. Activations are quantized on the fly, and `torch._scaled_mm` multiplies FP8 by FP8
on tensor cores, which support it from compute capability 8.9. It is fastest for compute-bound work, large
batches and long prompts, and always reads half the bytes of FP16.
"""

from schemas.job import Job
from workers.harness.main import main
from workers.protocol.backend import Backend, LoadedModel


def load(job: Job) -> LoadedModel:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    from workers.quantization.torchao_model import load_torchao_model

    return load_torchao_model(job, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))


if __name__ == "__main__":
    main(Backend(load))
