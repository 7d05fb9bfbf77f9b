# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.8,<2.14", "transformers>=5.17,<6", "accelerate>=1.13", "gguf>=0.17", "gptqmodel==7.6.0",
# ]
# [tool.qbench]
# precision = "gptq"
# label = "GPTQ INT4 (Marlin)"
# bits_per_weight = 4.13
# devices = ["cuda"]
# min_compute_capability = 8.0
# in_all = false
# calibrated = true
# ///
"""GPTQ INT4: weights compensate for the rounding of earlier ones (Frantar et al. 2022, arXiv:2210.17323).

Stores packed INT4 with a fixed zero point and an FP16 scale per group of input channels, calibrated by
GPTQModel, and multiplies in FP16 with its Marlin kernel, like `awq-marlin`. It is fastest for memory-bound
work, and stays ahead for batches of up to about 32 rows. nvcc compiles the kernel once.
"""

from schemas.job import Job
from workers.harness.main import main
from workers.protocol.backend import Backend, LoadedModel
from workers.quantization.gptq_checkpoint import is_prepared, packed_folder, prepare
from workers.quantization.marlin_build import build, is_built


def load(job: Job) -> LoadedModel:
    from gptqmodel.nn_modules.qlinear import marlin

    from workers.quantization.marlin_model import Layout, load_marlin_model, with_atomic_adds

    marlin.apply_gptq_marlin_linear = with_atomic_adds(marlin.apply_gptq_marlin_linear)
    stored = {"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": False}
    layout = Layout(marlin.MarlinLinear, {"desc_act": False, "sym": True}, stored)
    loaded = load_marlin_model(job, layout, packed_folder)
    return loaded._replace(settings={**loaded.settings, "atomic_adds": "below 2,048 outputs"})


if __name__ == "__main__":
    main(Backend(load, prepare, is_prepared, build, is_built, packed_folder))
