"""Loading through torchao, shared by its precisions.

torchao keeps the class of a linear layer and makes its weight a tensor subclass that implements the product.
Activations are BF16: the kernels of `int4-wo` and `fp8-dyn` accept nothing else, and in the INT8 formats a
product is scaled only after it is summed, when FP16 may already have overflowed.
"""

from typing import TYPE_CHECKING

import torch
from torchao.utils import TorchAOBaseTensor
from transformers import PreTrainedModel, TorchAoConfig

from schemas.job import Job
from workers.models.transformers_model import load_transformers_model
from workers.protocol.backend import LoadedModel
from workers.protocol.errors import Unsupported

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig


def load_torchao_model(job: Job, config: "AOBaseConfig") -> LoadedModel:
    """Quantize every linear layer but the head by `config`, each as soon as its weight is loaded.

    Raises `Unsupported` if the format can't store a layer's shape.
    """
    # Otherwise it would enable Inductor's tuning in the whole process, which
    # workers/generation/compilation.py configures.
    config.set_inductor_config = False
    loaded = load_transformers_model(job, torch.bfloat16, quantization_config=TorchAoConfig(config))
    if job.checkpoint is None:
        _refuse_leftovers(loaded.model)
    return loaded


def _refuse_leftovers(model: PreTrainedModel) -> None:
    """Raise `Unsupported` if torchao silently skipped a layer whose shape it can't quantize."""
    head = model.get_output_embeddings()
    left = {
        f"{module.out_features} × {module.in_features}"
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
        if not isinstance(module.weight, TorchAOBaseTensor)
    }
    if left:
        raise Unsupported(
            f"torchao can't quantize linear layers of shape {', '.join(sorted(left))} in this format",
            "use a format without groups, such as int8-wo",
        )
