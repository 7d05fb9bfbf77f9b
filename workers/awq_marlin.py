# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.8,<2.14", "transformers>=5.17,<6", "accelerate>=1.13", "gguf>=0.17", "gptqmodel==7.6.0",
# ]
# [tool.qbench]
# precision = "awq-marlin"
# label = "AWQ INT4 (Marlin)"
# bits_per_weight = 4.16
# devices = ["cuda"]
# min_compute_capability = 8.0
# in_all = false
# calibrated = true
# ///
"""AWQ INT4 with Marlin (Frantar et al. 2024, arXiv:2408.11743): the weights of `awq`, a faster kernel.

Stores what `awq` stores, repacked on the GPU into the order in which Marlin's threads read it, and multiplies
in FP16 with GPTQModel's Marlin kernel. The kernel saturates memory bandwidth for up to about 32 rows, so it
is fastest for memory-bound work, and stays ahead at batch sizes where other 4-bit kernels fall behind. nvcc
compiles it once.
"""

from schemas.job import Job
from workers.harness.main import main
from workers.protocol.backend import Backend, LoadedModel
from workers.quantization.awq_cache import is_prepared, packed_folder
from workers.quantization.awq_prepare import prepare
from workers.quantization.marlin_build import build, is_built


def load(job: Job) -> LoadedModel:
    from gptqmodel.nn_modules.qlinear.marlin_awq import AwqMarlinLinear

    from workers.quantization.marlin_model import Layout, load_marlin_model

    stored = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}
    layout = Layout(AwqMarlinLinear, {"desc_act": False, "sym": False}, stored)
    return load_marlin_model(job, layout, packed_folder)


if __name__ == "__main__":
    main(Backend(load, prepare, is_prepared, build, is_built, packed_folder))
