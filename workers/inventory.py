"""What a loaded model is made of, read off its modules: the proof of which kernels can run, and of the work
that a forward pass can't avoid."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from schemas.frames import ForwardCosts, Loaded
from workers.device import Device
from workers.protocol import LoadedModel

MOST_NAMES = 20


def take_inventory(loaded: LoadedModel, device: Device) -> Loaded:
    """Weight bytes by dtype, modules by class, what stayed unquantized, and the costs of a forward pass."""
    model = loaded.model
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model.config)
    linears = {name: each for name, each in model.named_modules() if hasattr(each, "in_features")}
    leaves = (module for module in model.modules() if not any(module.children()))
    return Loaded(
        weight_bytes=_bytes_by_dtype(_stored_tensors(model)),
        linear_classes=_classes(linears.values()),
        compute_dtype=_short(model.dtype),
        parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
        module_classes=_classes(leaves),
        unquantized_linears=_unquantized(linears),
        off_device=_off_device(model, device.torch),
        settings=_settings(model) | dict(loaded.settings),
        costs=_costs(model, skeleton),
    )


def _stored_tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.buffers()
    for parameter in module.parameters():
        yield parameter.data
        # bitsandbytes hangs scales (SCB, or a quant_state of several tensors) on the parameter itself.
        for attached in vars(parameter).values():
            for tensor in (attached, *getattr(attached, "__dict__", {}).values()):
                if isinstance(tensor, torch.Tensor):
                    yield tensor


def _bytes_by_dtype(tensors: Iterable[torch.Tensor]) -> dict[str, int]:
    """Bytes of distinct storage: tied weights count once."""
    found: Counter[str] = Counter()
    seen = set()
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            found[_short(tensor.dtype)] += storage.nbytes()
    return dict(found)


def _classes(modules: Iterable[torch.nn.Module]) -> dict[str, int]:
    return dict(Counter(type(module).__name__ for module in modules))


def _unquantized(linears: dict[str, torch.nn.Module]) -> dict[str, int]:
    plain = [name for name, module in linears.items() if type(module) is torch.nn.Linear]
    if len(plain) == len(linears):
        return {}
    return dict(Counter(re.sub(r"\b\d+\b", "*", name) for name in plain))


def _off_device(model: PreTrainedModel, device: torch.device) -> list[str]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in tensors if tensor.device.type != device.type][:MOST_NAMES]


def _settings(model: PreTrainedModel) -> dict[str, str]:
    quantization: Any = getattr(model.config, "quantization_config", None) or {}
    facts = quantization if isinstance(quantization, dict) else quantization.to_dict()
    # bitsandbytes' config holds the settings of both its formats, whichever is used.
    idle = "bnb_4bit" if facts.get("load_in_8bit") else "llm_int8" if facts.get("load_in_4bit") else "_"
    told = {
        name: str(getattr(value, "value", value))
        for name, value in facts.items()
        if isinstance(value, bool | int | float | str)
        and value is not False
        and not name.startswith(("_", idle))
    }
    return {"attention": str(model.config._attn_implementation), **told}


def _costs(model: PreTrainedModel, skeleton: PreTrainedModel) -> ForwardCosts | None:
    """None for a mixture of experts, of which a token passes only some."""
    config = model.config.get_text_config(decoder=True)
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head = skeleton.get_output_embeddings().weight.numel()
    linears = (each for each in skeleton.modules() if isinstance(each, torch.nn.Linear))
    return ForwardCosts(
        step_weight_bytes=sum(_bytes_by_dtype(_read_by_a_step(model)).values()),
        kv_bytes_per_token=2 * config.num_hidden_layers * key_heads * head_size * model.dtype.itemsize,
        linear_parameters=sum(each.weight.numel() for each in linears) - head,
        head_parameters=head,
        attention_width=config.num_hidden_layers * heads * head_size,
    )


def _read_by_a_step(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """All that is stored, input embeddings apart: a step reads one row of them, unless the head is tied."""
    embeddings = model.get_input_embeddings().weight.untyped_storage().data_ptr()
    head = model.get_output_embeddings()
    tied = embeddings in {tensor.untyped_storage().data_ptr() for tensor in _stored_tensors(head)}
    for tensor in _stored_tensors(model):
        if tied or tensor.untyped_storage().data_ptr() != embeddings:
            yield tensor


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
