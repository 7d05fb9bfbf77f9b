# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6,<2.14", "transformers>=5.17,<6", "accelerate>=1.10", "gguf>=0.17"]
# [tool.qbench]
# precision = "fp16"
# label = "FP16"
# bits_per_weight = 16
# devices = ["cpu", "cuda"]
# min_compute_capability = 5.3
# ///
"""FP16: IEEE half precision, the baseline that every other precision is compared with.

Stores 16 bits per weight and multiplies them directly, on tensor cores if the GPU has them. A decode step at
batch 1 must read every weight once, so it takes at least weight bytes divided by memory bandwidth.
"""

from schemas.job import Job
from workers.harness.main import main
from workers.protocol.backend import Backend, LoadedModel


def load(job: Job) -> LoadedModel:
    import torch

    from workers.models.transformers_model import load_transformers_model

    return load_transformers_model(job, torch.float16)._replace(max_gemv_batch=2)


if __name__ == "__main__":
    main(Backend(load))
