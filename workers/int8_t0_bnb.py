# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.6,<2.14", "transformers>=5.17,<6", "accelerate>=1.10", "gguf>=0.17", "bitsandbytes>=0.49",
# ]
# [tool.qbench]
# precision = "int8-t0"
# label = "INT8 (threshold 0)"
# bits_per_weight = 8
# devices = ["cpu", "cuda"]
# min_compute_capability = 7.5
# ///
"""INT8 without outliers: bitsandbytes with threshold 0, all columns multiplied in INT8.

The same bytes as LLM.int8, but no search for outlier columns and hence no synchronization at every linear
layer: faster, at a loss of quality on models that have outliers. It is listed separately because published
"INT8" figures mix the two.
"""

from schemas.job import Job
from workers.harness.main import main
from workers.protocol.backend import Backend, LoadedModel


def load(job: Job) -> LoadedModel:
    import torch
    from transformers import BitsAndBytesConfig

    from workers.models.transformers_model import load_transformers_model

    quantization = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    # FP16 activations: bitsandbytes casts any other type at every linear layer, inside the timed loop.
    return load_transformers_model(job, torch.float16, quantization_config=quantization)


if __name__ == "__main__":
    main(Backend(load))
