# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.11", "transformers>=5.17,<6", "accelerate>=1.10", "gguf>=0.17", "torchao==0.18.*",
# ]
# [tool.qbench]
# precision = "int8-dyn"
# label = "INT8 dynamic (torchao)"
# bits_per_weight = 8
# devices = ["cpu", "cuda"]
# min_compute_capability = 8.0
# ///
"""INT8 weights and activations: each row of activations gets a scale when it comes (torchao, W8A8).

Stores what `int8-wo` does. `torch._int_mm` multiplies INT8 by INT8 into INT32, on the tensor cores of a GPU,
which takes more than 16 rows; for fewer torchao converts both sides to FP32, unless torch.compile brings
another kernel. Made for compute-bound work: large batches and long prompts.
"""

from schemas.job import Job
from workers.protocol import LoadedModel, main


def load(job: Job) -> LoadedModel:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    from workers.torchao_model import load_torchao_model

    return load_torchao_model(job, Int8DynamicActivationInt8WeightConfig())


if __name__ == "__main__":
    main(load)
