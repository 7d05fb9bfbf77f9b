"""Packed four-bit weights in GPTQModel's Marlin layers, filled straight on the GPU and repacked there.

transformers loads AWQ and GPTQ checkpoints through GPTQModel too, but chooses a kernel by its own order. So
the architecture is built without storage, its quantized layers are replaced, and each tensor goes where its
name says. Layers of the same input are joined before they are repacked (`workers/kernels/joint_linear.py`).
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
from workers.kernels.joint_linear import join_linears, joined_setting
from workers.models.random_model import random_config, random_state_dict
from workers.models.random_packed import random_packed
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
    """What its constructor takes, beside shape and group size."""
    checkpoint: dict[str, Any]
    """What a checkpoint's quantization config must say; texts in lower case."""


def load_marlin_model(job: Job, layout: Layout, packed_folder: Callable[[Job], Path]) -> LoadedModel:
    """The job's model with a Marlin layer for every layer that is quantized in its checkpoint.

    Where the job names none, that is what was prepared in its `packed_folder`.
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
    del config.quantization_config  # transformers need not know: these are layers like any others
    names = {name for file in checkpoint.glob("*.safetensors") for name in _names_in(file)}
    model = empty_model(config, layout, group_size, {name.removesuffix(".qweight") for name in names})
    fill(model, layout, _tensors_in(checkpoint, job.device), job.device)
    loaded = _loaded(model, job, layout, group_size)
    if job.checkpoint is not None:
        return loaded
    return loaded._replace(settings={**loaded.settings, "calibration": str(read_note(checkpoint))})


def adding_atomically(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """GPTQModel's `product` of GPTQ's weights, which adds so where it takes that to be faster, if it is let.

    Of AWQ's fewer than 2,048 outputs it lets blocks of threads that share a sum add to it atomically; GPTQ's
    wait for each other in turn. With both adding, formats are compared and not that choice. At 7B, when keys
    and values were layers of their own, that made 215.8 tok/s of 161.7 (`results/h100-best-7b`) in `graph`.
    """
    return lambda **arguments: product(**{**arguments, "use_atomics": True})


def _loaded(model: PreTrainedModel, job: Job, layout: Layout, group_size: int) -> LoadedModel:
    settings = {"quant_method": layout.checkpoint["quant_method"], "group_size": str(group_size)}
    tokenizer = None if job.model.is_random else load_tokenizer(job)
    settings |= joined_setting(model) | {"kernel": "Marlin"}
    return LoadedModel(model, tokenizer, settings, (layout.layer,))


def checked_group_size(quantization: dict[str, Any], layout: Layout) -> int:
    """Group size of a checkpoint. Raises `Unsupported` for another format or layout."""
    found = {name: quantization.get(name) for name in layout.checkpoint}
    found = {name: value.lower() if isinstance(value, str) else value for name, value in found.items()}
    if found != layout.checkpoint:
        wanted, told = (
            ", ".join(f"{name} {value}" for name, value in facts.items())
            for facts in (layout.checkpoint, found)
        )
        raise Unsupported(f"Marlin takes checkpoints of {wanted}, not {told}", "name another --checkpoint")
    return int(quantization["group_size"])


def empty_model(
    config: PreTrainedConfig, layout: Layout, group_size: int, quantized: set[str]
) -> PreTrainedModel:
    """The architecture without storage, with Marlin layers in place of linear ones with these names."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    for name, linear in list(model.named_modules()):
        if name in quantized and isinstance(linear, torch.nn.Linear):
            model.set_submodule(name, _marlin_layer([linear], layout, group_size))
    return model


def _marlin_layer(linears: list[Any], layout: Layout, group_size: int) -> torch.nn.Module:
    """A layer without storage that makes what these make of one input."""
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
            f"Marlin can't hold a linear layer of the shape {shape} in groups of {group_size}",
            "take a format without groups, like int8",
        ) from error


def fill(
    model: PreTrainedModel, layout: Layout, tensors: Iterable[tuple[str, torch.Tensor]], device: str
) -> None:
    """Put each tensor where its name says, the rest of the model on the device, and repack for Marlin.

    Raises `OSError` where a tensor is missing: then it is no checkpoint of this model.
    """
    places = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    for name, tensor in tensors:
        if name in places:
            dtype = torch.float16 if tensor.is_floating_point() else None
            set_module_tensor_to_device(model, name, device, tensor, dtype=dtype)
    model.tie_weights()
    for name, empty in [*model.named_parameters(), *model.named_buffers()]:
        if empty.is_meta and empty.numel():
            raise OSError(f"the checkpoint lacks {name}")
        if empty.is_meta:
            set_module_tensor_to_device(model, name, device, torch.empty_like(empty, device=device))
    join_linears(model.to(device).eval(), layout.layer, partial(_joined, layout=layout))
    for layer in model.modules():
        if isinstance(layer, layout.layer):
            layer.post_init()


def _joined(layers: list[Any], layout: Layout) -> torch.nn.Module:
    joint = _marlin_layer(layers, layout, layers[0].group_size)
    for name, _ in [*joint.named_parameters(), *joint.named_buffers()]:
        tensors = [getattr(layer, name) for layer in layers]
        # Outputs lie along the last dimension of all but GPTQ's groups of inputs, which these layers share.
        tensor = tensors[0] if name == "g_idx" else torch.cat(tensors, dim=-1)
        set_module_tensor_to_device(joint, name, tensor.device, tensor)
    return joint.eval()


def _names_in(file: Path) -> list[str]:
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())


def _tensors_in(folder: Path, device: str) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt", device=device) as tensors:
            for name in tensors.keys():  # noqa: SIM118, since it is no dict
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
                yield name, random_packed(name, empty, config.initializer_range, generator)
            elif name.endswith("g_idx"):  # of GPTQ: which group an input belongs to, where not in turn
                yield name, torch.zeros_like(empty, device=job.device)

    fill(model, layout, tensors(), job.device)
    return model
