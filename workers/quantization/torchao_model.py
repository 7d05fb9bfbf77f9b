"""Loading through torchao: what its precisions share.

torchao leaves a linear layer the class it is and makes its weight a tensor subclass, which knows how it is to
be multiplied. Activations are BF16: the kernels of `int4-wo` and `fp8-dyn` take nothing else, and in the INT8
formats a product is scaled only after it is summed, by when FP16 can have overflowed.
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
    """Quantize every linear layer but the head as `config` says, each as soon as its weight is there.

    Raises `Unsupported` where the format can't hold a layer's shape.
    """
    # It would turn on Inductor's tuning for the whole process; workers/generation/compilation.py compiles.
    config.set_inductor_config = False
    loaded = load_transformers_model(job, torch.bfloat16, quantization_config=TorchAoConfig(config))
    if job.checkpoint is None:
        _refuse_leftovers(loaded.model)
    return loaded


def _refuse_leftovers(model: PreTrainedModel) -> None:
    """Without a word, torchao leaves a layer as it is whose shape it can't quantize."""
    head = model.get_output_embeddings()
    left = {
        f"{module.out_features} × {module.in_features}"
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
        if not isinstance(module.weight, TorchAOBaseTensor)
    }
    if left:
        raise Unsupported(
            f"torchao can't quantize linear layers of the shape {', '.join(sorted(left))} in this format",
            "take a format without groups, like int8-wo",
        )
