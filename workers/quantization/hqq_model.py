"""Loading through hqq: each linear layer is quantized as soon as its weight is on the device.

transformers 5 has an HQQ quantizer that can't quantize while it loads, so this is our own. The caller decides
what a weight becomes: it turns integers, scales and zero points into a layer. At most one weight is in memory
unquantized at any time, whether the model is read from files or drawn at random.
"""

from collections.abc import Callable
from typing import Any

import torch
from hqq.core.quantize import Quantizer
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from schemas.job import Job
from workers.models.transformers_model import load_transformers_model
from workers.protocol.backend import LoadedModel
from workers.protocol.errors import Unsupported

METHOD = "hqq-while-loading"
GROUP_SIZES = (128, 64, 32)

MakeLayer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.nn.Module]
"""Makes a layer of integers below 16, shape (out, in), with one scale and zero point per group. Weights are
(integers − zero) × scale. The bias is set afterwards."""


def load_hqq_model(job: Job, make_layer: MakeLayer) -> LoadedModel:
    """Quantize every linear layer but the head to HQQ INT4, and replace it by a layer from `make_layer`.

    Raises `Unsupported` if no group size divides the input widths.
    """
    return load_transformers_model(job, torch.float16, quantization_config=HqqConfig(make_layer))


class HqqConfig(QuantizationConfigMixin):
    """4 bits, asymmetric, grouped along the inputs (axis 1), the layout of fast kernels."""

    def __init__(self, make_layer: MakeLayer) -> None:
        self.quant_method = METHOD
        self.nbits = 4
        self.axis = 1
        self.group_size = GROUP_SIZES[0]
        self.make_layer = make_layer


@register_quantizer(METHOD)
class HqqQuantizer(HfQuantizer):
    """Quantizes while transformers loads a model."""

    quantization_config: HqqConfig
    requires_calibration = False
    is_trainable = False

    def is_serializable(self) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        head = model.get_output_embeddings()
        linears = (each for each in model.modules() if isinstance(each, torch.nn.Linear))
        widths = {each.in_features for each in linears if each is not head}
        self.quantization_config.group_size = choose_group_size(widths)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        module = model.get_submodule(path)
        return (
            name == "weight"
            and isinstance(module, torch.nn.Linear)
            and module is not model.get_output_embeddings()
        )

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        # transformers uses this to reserve memory before loading.
        return 0.5 if self.param_needs_quantization(model, param_name) else param.element_size()

    def get_quantize_ops(self) -> "QuantizeWeight":
        return QuantizeWeight(self.quantization_config)


class QuantizeWeight(ConversionOps):
    """Turns a weight that was just loaded into a layer, and replaces the linear layer with it."""

    def __init__(self, config: HqqConfig) -> None:
        self.config = config

    def convert(
        self,
        input_dict: dict[str, Any],
        model: PreTrainedModel,
        full_layer_name: str,
        missing_keys: set[str],
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        (loaded,) = input_dict.values()
        weight = loaded[0] if isinstance(loaded, list) else loaded
        path = full_layer_name.removesuffix(".weight")
        layer = self.config.make_layer(*quantize(weight, self.config))
        # The bias may be loaded later: then it has no storage yet, and the loader finds it by name.
        layer.register_parameter("bias", model.get_submodule(path).bias)
        layer._is_hf_initialized = True
        model.set_submodule(path, layer)
        missing_keys.discard(full_layer_name)
        return {}


def quantize(weight: torch.Tensor, config: HqqConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers as bytes in the weight's shape, and scales and zero points of shape (groups, 1)."""
    integers, found = Quantizer.quantize(
        weight,
        nbits=config.nbits,
        group_size=config.group_size,
        axis=config.axis,
        bitpack=False,
        device=weight.device,
    )
    scales, zero_points = (found[name].to(weight.dtype) for name in ("scale", "zero"))
    return integers.to(torch.uint8).view(weight.shape), scales, zero_points


def choose_group_size(widths: set[int]) -> int:
    """The largest usual group size that divides all input `widths`. Raises `Unsupported` if none does."""
    for group_size in GROUP_SIZES:
        if all(width % group_size == 0 for width in widths):
            return group_size
    raise Unsupported(
        f"HQQ needs input widths divisible by 32; this model has {sorted(widths)}",
        "use a format without groups, such as int8",
    )
