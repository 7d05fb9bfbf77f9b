"""AWQ recipes: the results of calibration, small enough to ship.

AWQ (Lin et al. 2023, arXiv:2306.00978) multiplies important input channels by a scale before rounding, folds
the inverse into the previous layer, and clips outlying weights. Finding scales and clips takes minutes;
applying them takes seconds. So the results are stored as a safetensors file named by content: the same model,
group size, calibration text and version of AutoAWQ give the same file name anywhere. Keys are
`LAYER.scale.PREVIOUS>LINEAR,LINEAR` (a vector over input channels) and `LAYER.clip.LINEAR` (output channels ×
groups × 1, the largest absolute weight of each group).
"""

import importlib.metadata
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from awq import AutoAWQForCausalLM
from awq.quantize.quantizer import AwqQuantizer
from awq.quantize.scale import apply_clip, apply_scale
from awq.utils.module import exclude_layers_to_not_quantize, get_named_linears
from safetensors.torch import load_file, save_file

from schemas.job import Job
from workers.protocol.backend import Report
from workers.quantization.calibration_text import BLOCK_TOKENS, text_name, text_path
from workers.quantization.checkpoint_cache import model_fingerprint
from workers.quantization.perplexity import heldout_text, perplexity


class Calibrator(AwqQuantizer):
    """AutoAWQ's search, with its results recorded and its bug on CPUs fixed."""

    def __init__(self, report: Report, *args: Any, **kwargs: Any) -> None:
        self.report = report
        self.recipe: dict[str, torch.Tensor] = {}
        super().__init__(*args, **kwargs)

    def _index(self, layer: torch.nn.Module) -> int:
        return next(index for index, module in enumerate(self.modules) if module is layer)

    def _get_input_feat(self, layer: torch.nn.Module, named_linears: Any) -> Any:
        self.report("calibrating layer", self._index(layer), len(self.modules))
        return super()._get_input_feat(layer, named_linears)

    def _search_best_scale(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        previous, linears, scales = super()._search_best_scale(module, *args, **kwargs)
        self.recipe[f"{self._index(module)}.scale.{previous}>{','.join(linears)}"] = scales.half()
        return previous, linears, scales

    def _search_best_clip(self, layer: torch.nn.Module, *args: Any) -> Any:
        clips = super()._search_best_clip(layer, *args)
        for linear, largest in clips:
            self.recipe[f"{self._index(layer)}.clip.{linear}"] = largest.cpu().half().contiguous()
        return clips

    def _compute_best_scale(
        self, x: Any, w_mean: Any, x_mean: Any, module2inspect: torch.nn.Module, *args: Any
    ) -> Any:
        # AutoAWQ tries a scale on the live weights and restores them from `{k: v.cpu()}`. On a CPU `.cpu()`
        # returns the live tensor itself, so nothing is restored and every trial's scale stays in the weights.
        hook = module2inspect.register_state_dict_post_hook(_clone_entries)
        try:
            return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *args)
        finally:
            hook.remove()


def _clone_entries(_module: Any, state_dict: dict[str, torch.Tensor], _prefix: Any, _metadata: Any) -> None:
    for name, tensor in state_dict.items():
        state_dict[name] = tensor.clone()


class RecipePacker(AwqQuantizer):
    """AutoAWQ's packing, with scales and clips read from a recipe instead of searched."""

    def __init__(self, recipe: dict[str, torch.Tensor], report: Report, *args: Any, **kwargs: Any) -> None:
        self.recipe = recipe
        self.report = report
        super().__init__(*args, **kwargs)

    def init_quant(self, **_: Any) -> Any:
        # No activations are needed, so none are recorded.
        return self.awq_model.get_model_layers(self.model), {}, None

    def quantize(self) -> None:
        for index, layer in enumerate(self.modules):
            self.report("packing layer", index, len(self.modules))
            apply_scale(layer, list(self._scales(index)))
            apply_clip(layer, list(self._entries(index, "clip")))
            linears = exclude_layers_to_not_quantize(get_named_linears(layer), self.modules_to_not_convert)
            self._apply_quant(layer, linears)

    def _entries(self, index: int, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
        prefix = f"{index}.{kind}."
        for key, value in self.recipe.items():
            if key.startswith(prefix):
                yield key.removeprefix(prefix), value

    def _scales(self, index: int) -> Iterator[tuple[str, list[str], torch.Tensor]]:
        for key, scales in self._entries(index, "scale"):
            previous, linears = key.split(">")
            yield previous, linears.split(","), scales


def calibrate(
    job: Job, folder: Path, group_size: int, blocks: list[list[int]], recipe_file: Path, report: Report
) -> None:
    """Search scales and clips for the model in `folder` and write them to `recipe_file`.

    The file's metadata records how it was made, and the perplexity of held-out text before and after
    rounding. Runs on the GPU in float16 if there is one, otherwise on the CPU in bfloat16 (float16 is far
    slower there).
    """
    on_gpu = torch.cuda.is_available()
    dtype = torch.float16 if on_gpu else torch.bfloat16
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = AutoAWQForCausalLM.from_pretrained(
        str(folder), torch_dtype=dtype, device_map={"": "cpu"}, safetensors=True
    )
    before = perplexity(model.model, tokenizer, heldout_text())
    model.quantize(
        tokenizer,
        quant_config=quantization_config(group_size),
        calib_data=blocks,
        max_calib_samples=len(blocks),
        max_calib_seq_len=BLOCK_TOKENS,
        quantizer_cls=partial(Calibrator, report),
    )
    after = perplexity(model.model.to("cuda" if on_gpu else "cpu"), tokenizer, heldout_text())
    metadata = {
        "model": job.model.name,
        "command": _command(job),
        "fingerprint": model_fingerprint(folder),
        "group_size": str(group_size),
        "calibration": f"{len(blocks)} blocks of {BLOCK_TOKENS} tokens of {text_name(job)}, {dtype}",
        "versions": _versions("autoawq", "torch", "transformers"),
        "heldout_perplexity": f"{before:.3f} before, {after:.3f} after",
    }
    recipe_file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = recipe_file.with_suffix(".part")
    save_file(model.quantizer.recipe, unfinished, metadata)
    unfinished.replace(recipe_file)


def _versions(*packages: str) -> str:
    return " ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def _command(job: Job) -> str:
    words = ["qbench-worker", job.precision, "--calibrate", "--model", job.model.name]
    return shlex.join(words + ([] if job.calibration is None else ["--calibration", text_path(job).name]))


def pack(folder: Path, recipe_file: Path, group_size: int, packed_folder: Path, report: Report) -> None:
    """Quantize the model in `folder` by a recipe, and save it as a checkpoint that AutoAWQ can load."""
    model = AutoAWQForCausalLM.from_pretrained(
        str(folder), torch_dtype=torch.float16, device_map={"": "cpu"}, safetensors=True
    )
    packer = partial(RecipePacker, load_file(recipe_file), report)
    model.quantize(None, quant_config=quantization_config(group_size), quantizer_cls=packer)
    model.save_quantized(str(packed_folder))
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(packed_folder)


def quantization_config(group_size: int) -> dict[str, Any]:
    """AutoAWQ's usual format: 4 bits, asymmetric, GEMM layout."""
    return {"zero_point": True, "q_group_size": group_size, "w_bit": 4, "version": "GEMM"}
