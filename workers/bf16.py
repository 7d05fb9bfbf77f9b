# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6,<2.14", "transformers>=5.17,<6", "accelerate>=1.10", "gguf>=0.17"]
# [tool.qbench]
# precision = "bf16"
# label = "BF16"
# bits_per_weight = 16
# devices = ["cpu", "cuda"]
# min_compute_capability = 8.0
# ///
"""BF16: 16 bits with FP32's range and a shorter mantissa.

The same bytes as FP16, hence the same lower bounds on memory and decode time. Most models are trained in it,
and it doesn't overflow where FP16 does. GPUs before Ampere have no hardware support for it.
"""

from schemas.job import Job
from workers.harness.main import main
from workers.protocol.backend import Backend, LoadedModel


def load(job: Job) -> LoadedModel:
    import torch

    from workers.models.transformers_model import load_transformers_model

    return load_transformers_model(job, torch.bfloat16)._replace(max_gemv_batch=2)


if __name__ == "__main__":
    main(Backend(load))
