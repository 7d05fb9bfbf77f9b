# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.6,<2.14", "transformers>=5.17,<6", "accelerate>=1.10", "gguf>=0.17", "bitsandbytes>=0.49",
# ]
# [tool.qbench]
# precision = "fp4"
# label = "FP4 (bitsandbytes)"
# bits_per_weight = 4.5
# devices = ["cpu", "cuda"]
# min_compute_capability = 7.5
# ///
"""FP4: 4-bit floats with a sign, two exponent bits and one mantissa bit (bitsandbytes).

The same bytes, scales and kernels as NF4; only the 16-entry codebook differs. So their speeds should agree,
and quality shows which codebook fits the weights better. It isn't the FP4 that Blackwell's tensor cores
multiply.
"""

from schemas.job import Job
from workers.harness.main import main
from workers.protocol.backend import Backend, LoadedModel


def load(job: Job) -> LoadedModel:
    import torch
    from transformers import BitsAndBytesConfig

    from workers.models.transformers_model import load_transformers_model

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float16
    )
    return load_transformers_model(job, torch.float16, quantization_config=quantization)


if __name__ == "__main__":
    main(Backend(load))
