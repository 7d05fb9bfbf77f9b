# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.6,<2.14", "transformers>=5.17,<6", "accelerate>=1.10", "gguf>=0.17", "bitsandbytes>=0.49",
# ]
# [tool.qbench]
# precision = "int8"
# label = "INT8 (LLM.int8)"
# bits_per_weight = 8
# devices = ["cpu", "cuda"]
# min_compute_capability = 7.5
# ///
"""LLM.int8: 8-bit weights with outliers kept in FP16 (bitsandbytes; Dettmers et al. 2022, arXiv:2208.07339).

Stores weights as INT8 with one scale per output row. Activations are quantized on the fly; columns with a
value of at least 6.0 are multiplied in FP16 instead, and finding them synchronizes with the host at every
linear layer. It halves memory at almost no loss of quality, but is seldom faster than FP16 at batch 1.
"""

from schemas.job import Job
from workers.harness.main import main
from workers.protocol.backend import Backend, LoadedModel


def load(job: Job) -> LoadedModel:
    import torch
    from transformers import BitsAndBytesConfig

    from workers.models.transformers_model import load_transformers_model

    quantization = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)
    # FP16 activations: bitsandbytes casts any other type at every linear layer, inside the timed loop.
    return load_transformers_model(job, torch.float16, quantization_config=quantization)


if __name__ == "__main__":
    main(Backend(load))
