# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6,<2.14", "transformers>=5.17,<6", "accelerate>=1.10", "gguf>=0.17"]
# [tool.qbench]
# precision = "fp32"
# label = "FP32"
# bits_per_weight = 32
# devices = ["cpu", "cuda"]
# ///
"""FP32: single precision, the reference for quality.

Twice the bytes of FP16, so at best half its decode speed, and no tensor cores unless TF32 is enabled, which
it isn't in torch by default. Worth its cost only as a reference, or on CPUs without half-precision
arithmetic.
"""

from schemas.job import Job
from workers.harness.main import main
from workers.protocol.backend import Backend, LoadedModel


def load(job: Job) -> LoadedModel:
    import torch

    from workers.models.transformers_model import load_transformers_model

    return load_transformers_model(job, torch.float32)


if __name__ == "__main__":
    main(Backend(load))
