# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.6,<2.14", "transformers>=5.17,<6", "accelerate>=1.10", "gguf>=0.17", "bitsandbytes>=0.49",
# ]
# [tool.qbench]
# precision = "nf4"
# label = "NF4 (bitsandbytes)"
# bits_per_weight = 4.5
# devices = ["cpu", "cuda"]
# min_compute_capability = 7.5
# ///
"""NF4: a 4-bit codebook for normally distributed weights (Dettmers et al. 2023, arXiv:2305.14314).

Stores 4-bit indices into a 16-entry codebook, two per byte, with an FP32 scale for every 64 weights (no
double quantization). For a few rows, bitsandbytes' kernel looks the values up while it multiplies; for
many, the weight is dequantized to FP16 and multiplied by cuBLAS. It needs a quarter of FP16's bytes without
calibration: useful when memory is scarce, and fast at batch 1, which is memory-bound.
"""

from schemas.job import Job
from workers.harness.main import main
from workers.protocol.backend import Backend, LoadedModel


def load(job: Job) -> LoadedModel:
    import torch
    from transformers import BitsAndBytesConfig

    from workers.models.transformers_model import load_transformers_model

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16
    )
    return load_transformers_model(job, torch.float16, quantization_config=quantization)


if __name__ == "__main__":
    main(Backend(load))
