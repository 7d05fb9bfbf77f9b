# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.6,<2.14", "transformers>=5.17,<6", "accelerate>=1.10", "gguf>=0.17",
#   "autoawq==0.2.9", "datasets>=2.20",
# ]
# [tool.qbench]
# precision = "awq"
# label = "AWQ INT4 (AutoAWQ)"
# bits_per_weight = 4.16
# devices = ["cpu", "cuda"]
# min_compute_capability = 7.5
# calibrated = true
# ///
"""AWQ INT4: 4-bit weights, calibrated so that the most important channels keep their precision.

Stores packed INT4 with an FP16 scale and an INT4 zero point per group of input channels, and multiplies in
FP16 with AutoAWQ's Triton kernel (on a CPU it dequantizes at every call, for reference only). It saves the
most memory; whether it is faster than FP16 depends on the kernel, not on the format.
"""

from schemas.job import Job
from workers.harness.main import main
from workers.protocol.backend import Backend, LoadedModel, Report
from workers.quantization.awq_cache import is_prepared, packed_folder


def load(job: Job) -> LoadedModel:
    from workers.quantization.awq_model import load_awq_model

    return load_awq_model(job)


def prepare(job: Job, report: Report) -> None:
    from workers.quantization.awq_model import prepare_checkpoint

    prepare_checkpoint(job, report)


if __name__ == "__main__":
    main(Backend(load, prepare, is_prepared, prepared_folder=packed_folder))
