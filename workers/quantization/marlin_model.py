"""Packed INT4 weights in GPTQModel's Marlin layers, loaded straight to the GPU and repacked there.

transformers loads AWQ and GPTQ checkpoints through GPTQModel too, but picks the kernel in its own order of
preference. So the architecture is built without storage, its quantized layers are replaced, and tensors are
assigned by name. Layers of the same input are merged before they are repacked
(`workers/kernels/merged_linear.py`).
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from schemas.job import Job
from workers.kernels.merged_linear import merge_linears, merged_setting
from workers.models.random_int4 import random_int4_tensor
from workers.models.random_model import random_config, random_state_dict
from workers.models.transformers_model import load_tokenizer
from workers.protocol.backend import LoadedModel
from workers.protocol.errors import Unsupported
from workers.quantization.calibration_text import read_note

RANDOM_GROUP_SIZE = 128


class Layout(NamedTuple):
    """A packed format that Marlin can repack."""

    layer: type[torch.nn.Module]
    """GPTQModel's class for it."""
    options: dict[str, bool]
    """Arguments of its constructor besides shape and group size."""
    checkpoint: dict[str, Any]
    """Required values of a checkpoint's quantization config; strings in lower case."""


def load_marlin_model(job: Job, layout: Layout, packed_folder: Callable[[Job], Path]) -> LoadedModel:
    """The job's model with a Marlin layer for every layer that is quantized in its checkpoint.

    A job without a checkpoint uses the one prepared in its `packed_folder`.
    """
    if job.model.is_random:
        if job.model.outliers:
            raise Unsupported(
                "outliers can't be planted in weights packed for Marlin", "leave --outliers out"
            )
        return _loaded(_random_model(job, layout), job, layout, RANDOM_GROUP_SIZE)
    checkpoint = Path(job.checkpoint or packed_folder(job))
    if not checkpoint.is_dir():
        checkpoint = Path(snapshot_download(str(checkpoint)))
    config = AutoConfig.from_pretrained(checkpoint)
    group_size = checked_group_size(getattr(config, "quantization_config", {}), layout)
    del config.quantization_config  # or transformers would quantize the model itself
    names = {name for file in checkpoint.glob("*.safetensors") for name in _names_in(file)}
    model = empty_model(config, layout, group_size, {name.removesuffix(".qweight") for name in names})
    fill(model, layout, _tensors_in(checkpoint, job.device), job.device)
    loaded = _loaded(model, job, layout, group_size)
    if job.checkpoint is not None:
        return loaded
    return loaded._replace(settings={**loaded.settings, "calibration": str(read_note(checkpoint))})


def with_atomic_adds(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """GPTQModel's `product` of GPTQ weights, allowed to add atomically if it expects that to be faster.

    For AWQ with fewer than 2,048 outputs, GPTQModel lets thread blocks that share a sum add to it atomically;
    for GPTQ they wait for each other in turn. With atomics in both, the formats are compared and not that
    choice. At 7B, when keys and values were separate layers, it raised `graph` from 161.7 to 215.8 tok/s
    (`results/h100-best-7b`).
    """
    return lambda **arguments: product(**{**arguments, "use_atomics": True})


def _loaded(model: PreTrainedModel, job: Job, layout: Layout, group_size: int) -> LoadedModel:
    settings = {"quant_method": layout.checkpoint["quant_method"], "group_size": str(group_size)}
    tokenizer = None if job.model.is_random else load_tokenizer(job)
    settings |= merged_setting(model) | {"kernel": "Marlin"}
    return LoadedModel(model, tokenizer, settings, (layout.layer,))


def checked_group_size(quantization: dict[str, Any], layout: Layout) -> int:
    """Group size of a checkpoint. Raises `Unsupported` if its format or layout is not `layout`."""
    found = {name: quantization.get(name) for name in layout.checkpoint}
    found = {name: value.lower() if isinstance(value, str) else value for name, value in found.items()}
    if found != layout.checkpoint:
        wanted, given = (
            ", ".join(f"{name} {value}" for name, value in facts.items())
            for facts in (layout.checkpoint, found)
        )
        raise Unsupported(
            f"Marlin needs a checkpoint with {wanted}, not with {given}", "pass another --checkpoint"
        )
    return int(quantization["group_size"])


def empty_model(
    config: PreTrainedConfig, layout: Layout, group_size: int, quantized: set[str]
) -> PreTrainedModel:
    """The architecture without storage, its linear layers named in `quantized` replaced by Marlin layers."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    for name, linear in list(model.named_modules()):
        if name in quantized and isinstance(linear, torch.nn.Linear):
            model.set_submodule(name, marlin_layer([linear], layout, group_size))
    return model


def marlin_layer(linears: list[Any], layout: Layout, group_size: int) -> torch.nn.Module:
    """A layer without storage for the concatenated outputs of `linears`."""
    in_features, out_features = linears[0].in_features, sum(each.out_features for each in linears)
    try:
        with torch.device("meta"):
            return layout.layer(
                bits=4,
                group_size=group_size,
                in_features=in_features,
                out_features=out_features,
                bias=linears[0].bias is not None,
                register_buffers=True,
                **layout.options,
            )
    except NotImplementedError as error:
        shape = f"{out_features} × {in_features}"
        raise Unsupported(
            f"Marlin can't store a linear layer of shape {shape} in groups of {group_size}",
            "use a format without groups, such as int8",
        ) from error


def fill(
    model: PreTrainedModel, layout: Layout, tensors: Iterable[tuple[str, torch.Tensor]], device: str
) -> None:
    """Assign each tensor by its name, move the rest of the model to the device, and repack for Marlin.

    Raises `OSError` if a tensor is missing, since it is then not a checkpoint of this model.
    """
    targets = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    for name, tensor in tensors:
        if name in targets:
            dtype = torch.float16 if tensor.is_floating_point() else None
            set_module_tensor_to_device(model, name, device, tensor, dtype=dtype)
    model.tie_weights()
    for name, empty in [*model.named_parameters(), *model.named_buffers()]:
        if empty.is_meta and empty.numel():
            raise OSError(f"the checkpoint lacks {name}")
        if empty.is_meta:
            set_module_tensor_to_device(model, name, device, torch.empty_like(empty, device=device))
    merge_linears(model.to(device).eval(), layout.layer, partial(merged_layer, layout=layout))
    for layer in model.modules():
        if isinstance(layer, layout.layer):
            layer.post_init()


def merged_layer(layers: list[Any], layout: Layout) -> torch.nn.Module:
    """One layer with the concatenated outputs of several, which have not been repacked yet."""
    merged = marlin_layer(layers, layout, layers[0].group_size)
    for name, _ in [*merged.named_parameters(), *merged.named_buffers()]:
        tensors = [getattr(layer, name) for layer in layers]
        # The last dimension is outputs, except in GPTQ's g_idx, the groups of the shared inputs.
        tensor = tensors[0] if name == "g_idx" else torch.cat(tensors, dim=-1)
        set_module_tensor_to_device(merged, name, tensor.device, tensor)
    return merged.eval()


def _names_in(file: Path) -> list[str]:
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())


def _tensors_in(folder: Path, device: str) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt", device=device) as tensors:
            for name in tensors.keys():  # noqa: SIM118, not a dict
                yield name, tensors.get_tensor(name)


def _random_model(job: Job, layout: Layout) -> PreTrainedModel:
    config = random_config(job.model.location)
    dense = random_state_dict(config, job.device, torch.float16, job.seed)
    in_layers = {name.removesuffix(".weight") for name in dense if ".layers." in name}
    model = empty_model(config, layout, RANDOM_GROUP_SIZE, in_layers)
    generator = torch.Generator(job.device).manual_seed(job.seed)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, empty in [*model.named_parameters(), *model.named_buffers()]:
            if name in dense:
                yield name, dense[name][...]
            elif name.endswith(("qweight", "qzeros", "scales")):
                yield name, random_int4_tensor(name, empty, config.initializer_range, generator)
            elif name.endswith("g_idx"):  # GPTQ: the group of each input, if inputs are reordered
                yield name, torch.zeros_like(empty, device=job.device)

    fill(model, layout, tensors(), job.device)
    return model
