# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.10,<2.14", "transformers>=5.17,<6", "accelerate>=1.10", "gguf>=0.17",
#   "hqq==0.2.8.post1", "gemlite==0.6.0.post2",
# ]
# [tool.qbench]
# precision = "hqq"
# label = "HQQ INT4 (gemlite)"
# bits_per_weight = 4.25
# devices = ["cuda"]
# min_compute_capability = 8.0
# in_all = false
# ///
"""HQQ INT4: zero points fitted to the weights, in seconds and without calibration data (Badri & Shaji 2023).

Stores packed INT4 with an FP16 scale and an FP16 zero point per group of 128 input channels (64 or 32 if 128
doesn't divide them). gemlite's Triton kernels dequantize in registers while they multiply: a matrix-vector
kernel for up to four rows, split-K below 64, GEMM above. It is fastest for memory-bound work at small
batches. Kernels are tuned at first use, before anything is timed; gemlite ships tuning results for some GPUs,
including the H100. It can't be imported without a GPU.
"""

from schemas.job import Job
from workers.harness.main import main
from workers.protocol.backend import Backend, LoadedModel


def load(job: Job) -> LoadedModel:
    from gemlite.core import GemLiteLinearTriton
    from gemlite.helper import A16W4_HQQ_INT

    from workers.quantization.hqq_model import load_hqq_model

    loaded = load_hqq_model(job, A16W4_HQQ_INT(job.device).from_weights)
    return loaded._replace(opaque=(GemLiteLinearTriton,))


if __name__ == "__main__":
    main(Backend(load))
