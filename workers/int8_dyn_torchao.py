# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.11,<2.14", "transformers>=5.17,<6", "accelerate>=1.10", "gguf>=0.17", "torchao==0.18.*",
# ]
# [tool.qbench]
# precision = "int8-dyn"
# label = "INT8 dynamic (torchao)"
# bits_per_weight = 8
# devices = ["cpu", "cuda"]
# min_compute_capability = 8.0
# ///
"""INT8 weights and activations: each row of activations is scaled on the fly (torchao, W8A8).

Stores what `int8-wo` does. `torch._int_mm` multiplies INT8 by INT8 into INT32, on a GPU's tensor cores. Fewer
than 17 rows are padded to 17. Designed for compute-bound work: large batches and long prompts.
"""

from schemas.job import Job
from workers.harness.main import main
from workers.protocol.backend import Backend, LoadedModel


def load(job: Job) -> LoadedModel:
    from torchao.kernel import intmm
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    from workers.kernels.int_mm import MIN_ROWS, int_mm, scaled_int_mm
    from workers.quantization.torchao_model import load_torchao_model

    loaded = load_torchao_model(job, Int8DynamicActivationInt8WeightConfig())
    intmm.safe_int_mm = int_mm
    intmm._int_scaled_matmul_cpu = scaled_int_mm
    return loaded._replace(settings={**loaded.settings, "fewest_rows": f"{MIN_ROWS}, by padding"})


if __name__ == "__main__":
    main(Backend(load))
