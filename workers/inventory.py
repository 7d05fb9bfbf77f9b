"""What a loaded model is made of, read off its modules: the proof of which kernels can run."""

from collections import Counter
from collections.abc import Iterator

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from schemas.frames import Loaded


def take_inventory(model: PreTrainedModel) -> Loaded:
    """Weight bytes by dtype, linear layers by class, and the size of the unquantized architecture."""
    weight_bytes: Counter[str] = Counter()
    seen = set()
    for tensor in _stored_tensors(model):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            weight_bytes[str(tensor.dtype).removeprefix("torch.")] += storage.nbytes()
    classes = Counter(type(module).__name__ for module in model.modules() if hasattr(module, "in_features"))
    return Loaded(
        weight_bytes=dict(weight_bytes),
        linear_classes=dict(classes),
        compute_dtype=str(model.dtype).removeprefix("torch."),
        parameters=_unquantized_parameters(model),
    )


def _stored_tensors(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter.data
        # bitsandbytes hangs scales (SCB, or a quant_state of several tensors) on the parameter itself.
        for attached in vars(parameter).values():
            for tensor in (attached, *getattr(attached, "__dict__", {}).values()):
                if isinstance(tensor, torch.Tensor):
                    yield tensor


def _unquantized_parameters(model: PreTrainedModel) -> int:
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model.config)
    return sum(parameter.numel() for parameter in skeleton.parameters())
