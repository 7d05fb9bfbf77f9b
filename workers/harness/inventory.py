"""The contents of a loaded model, read from its modules: which kernels can run, and what a step must read."""

import enum
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from schemas.frames import ForwardCosts, Loaded
from workers.generation.device import Device
from workers.protocol.backend import LoadedModel

MAX_NAMES = 20
SCALES = {"scales", "scale", "SCB", "absmax", "scale_and_zero"}
"""Names in AutoAWQ, GPTQModel and gemlite, torchao, and bitsandbytes."""
ZERO_POINTS = {"qzeros", "zeros", "zero_point"}


class Stored(NamedTuple):
    """A tensor of a model, under its name in the module or parameter that holds it."""

    name: str
    tensor: torch.Tensor


def take_inventory(loaded: LoadedModel, device: Device) -> Loaded:
    """Weight bytes by dtype, modules by class, unquantized layers, and the costs of a forward pass."""
    model = loaded.model
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model.config)
    linears = {name: each for name, each in model.named_modules() if hasattr(each, "in_features")}
    leaves = (module for module in model.modules() if not any(module.children()))
    return Loaded(
        weight_bytes=_bytes_by(_dtype, _stored_tensors(model)),
        weight_kinds=_bytes_by(_kind, _stored_tensors(model)),
        linear_classes=_classes(linears.values()),
        compute_dtype=_short(model.dtype),
        parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
        module_classes=_classes(leaves),
        unquantized_linears=_unquantized(linears),
        off_device=_off_device(model, device.torch),
        settings=_settings(model) | dict(loaded.settings),
        costs=_costs(model, skeleton),
    )


def _stored_tensors(module: torch.nn.Module) -> Iterator[Stored]:
    for name, buffer in module.named_buffers():
        yield Stored(name, buffer)
    for name, parameter in module.named_parameters():
        yield from _unwrapped(Stored(name, parameter))
        # bitsandbytes attaches scales to the parameter itself: SCB, or a quant_state, which may contain
        # another.
        yield from _tensors_in(parameter)
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            yield from _tensors_in(state)
            state = state.state2


def _unwrapped(stored: Stored) -> Iterator[Stored]:
    """The tensor itself, or the tensors inside a wrapper subclass like torchao's."""
    if not is_wrapper(stored.tensor):
        yield stored
        return
    names, _ = stored.tensor.__tensor_flatten__()
    for name in names:
        yield from _unwrapped(Stored(name, getattr(stored.tensor, name)))


def is_wrapper(value: object) -> bool:
    """Whether a tensor is only a wrapper around others, by the protocol of torch's wrapper subclasses."""
    return isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__")


def _tensors_in(holder: object) -> Iterator[Stored]:
    for name, value in vars(holder).items():
        if isinstance(value, torch.Tensor):
            yield Stored(name, value)


def _bytes_by(key: Callable[[Stored], str], tensors: Iterable[Stored]) -> dict[str, int]:
    """Bytes of distinct storages: tied weights count once."""
    found: Counter[str] = Counter()
    seen = set()
    for stored in tensors:
        storage = stored.tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            found[key(stored)] += storage.nbytes()
    return dict(found)


def _dtype(stored: Stored) -> str:
    return _short(stored.tensor.dtype)


def _kind(stored: Stored) -> str:
    """Purpose and dtype of a stored tensor, by its name in the libraries, e.g. `scales float16`."""
    last = stored.name.rpartition(".")[2]
    if last in ZERO_POINTS:
        kind = "zero points"
    elif last in SCALES:
        kind = "scales"
    elif stored.tensor.dim() > 1:
        kind = "matrices"
    else:
        kind = "vectors"
    return f"{kind} {_dtype(stored)}"


def _classes(modules: Iterable[torch.nn.Module]) -> dict[str, int]:
    return dict(Counter(map(_class, modules)))


def _class(module: torch.nn.Module) -> str:
    """Name of its class, and in brackets that of its weight if the weight implements the product."""
    name = type(module).__name__
    weight = getattr(module, "weight", None)
    return f"{name}[{type(weight).__name__}]" if is_wrapper(weight) else name


def _unquantized(linears: dict[str, torch.nn.Module]) -> dict[str, int]:
    plain = [name for name, module in linears.items() if _class(module) == torch.nn.Linear.__name__]
    if len(plain) == len(linears):
        return {}
    return dict(Counter(re.sub(r"\b\d+\b", "*", name) for name in plain))


def _off_device(model: PreTrainedModel, device: torch.device) -> list[str]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in tensors if tensor.device.type != device.type][:MAX_NAMES]


def _settings(model: PreTrainedModel) -> dict[str, str]:
    quantization: Any = getattr(model.config, "quantization_config", None) or {}
    facts = quantization if isinstance(quantization, dict) else quantization.to_dict()
    # bitsandbytes' config contains the settings of both its formats; `idle` is the prefix of the unused one.
    idle = "bnb_4bit" if facts.get("load_in_8bit") else "llm_int8" if facts.get("load_in_4bit") else "_"
    reported = {
        name: str(getattr(value, "value", value))
        for name, value in facts.items()
        if isinstance(value, bool | int | float | str) and not name.startswith(("_", "load_in", idle))
    }
    return {
        "attention": str(model.config._attn_implementation),
        **reported,
        **_torchao_settings(quantization),
    }


def _torchao_settings(quantization: Any) -> dict[str, str]:
    """Settings of the format's own config, which transformers' torchao config wraps."""
    inner = getattr(quantization, "quant_type", None)
    if inner is None:
        return {}
    fields = {name: value for name, value in vars(inner).items() if value is not None}
    return {"quant_type": type(inner).__name__} | {
        name: value.name.lower() if isinstance(value, enum.Enum) else str(value)
        for name, value in fields.items()
    }


def _costs(model: PreTrainedModel, skeleton: PreTrainedModel) -> ForwardCosts | None:
    """None for a mixture of experts, where each token uses only some of the weights."""
    config = model.config.get_text_config(decoder=True)
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head = skeleton.get_output_embeddings().weight.numel()
    linears = (each for each in skeleton.modules() if isinstance(each, torch.nn.Linear))
    return ForwardCosts(
        step_weight_bytes=sum(_bytes_by(_dtype, _read_by_a_step(model)).values()) - _padding_bytes(model),
        kv_bytes_per_token=2 * config.num_hidden_layers * key_heads * head_size * model.dtype.itemsize,
        linear_parameters=sum(each.weight.numel() for each in linears) - head,
        head_parameters=head,
        attention_width=config.num_hidden_layers * heads * head_size,
    )


def _read_by_a_step(model: PreTrainedModel) -> Iterator[Stored]:
    """Everything but the input embeddings, of which a step reads one row, unless the head is tied to them."""
    embeddings = model.get_input_embeddings().weight.untyped_storage().data_ptr()
    head = model.get_output_embeddings()
    tied = embeddings in {stored.tensor.untyped_storage().data_ptr() for stored in _stored_tensors(head)}
    for stored in _stored_tensors(model):
        if tied or stored.tensor.untyped_storage().data_ptr() != embeddings:
            yield stored


def _padding_bytes(model: PreTrainedModel) -> int:
    """Padding of torchao's tiled INT4 beyond the width of its layers, which a step need not read."""
    padding = 0
    for parameter in model.parameters():
        scales = getattr(parameter, "scale_and_zero", None)  # (groups, outputs, 2)
        if scales is not None:
            width = scales.shape[0] * parameter.block_size[-1]
            padding += (parameter.qdata.nbytes + scales.nbytes) * (width - parameter.shape[1]) // width
    return padding


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
