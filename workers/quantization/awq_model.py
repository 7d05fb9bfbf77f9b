"""AWQ weights on a device through AutoAWQ: from a checkpoint, from a recipe, or random."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from awq import AutoAWQForCausalLM
from awq.modules.linear import gemm
from awq.utils.module import get_named_linears, set_op_by_name
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from schemas.job import Job
from workers.models import source as model_source
from workers.models.planted_outliers import READERS, outlier_channels
from workers.models.random_int4 import ZERO_POINTS_OF_8, random_int4_tensor
from workers.models.random_model import random_config, random_state_dict
from workers.models.transformers_model import load_tokenizer
from workers.protocol.backend import LoadedModel, Report
from workers.quantization.awq_cache import packed_folder, recipe_file
from workers.quantization.awq_calibration import calibrate, pack
from workers.quantization.calibration_text import calibrated_with, read_note, samples, write_note
from workers.quantization.checkpoint_cache import choose_group_size

RANDOM_GROUP_SIZE = 128
OPAQUE = (gemm.WQLinear_GEMM,)


def prepare_checkpoint(job: Job, report: Report) -> None:
    """Pack this job's model by its recipe, calibrating first if there is no recipe yet."""
    began_s = time.monotonic()
    folder, recipe, packed = model_source.folder(job), recipe_file(job), packed_folder(job)
    group_size = choose_group_size(folder)
    blocks = samples(job, AutoTokenizer.from_pretrained(folder))
    with runnable_on(job.device):
        if not recipe.exists():
            calibrate(job, folder, group_size, blocks, recipe, report)
        unfinished = packed.with_name(packed.name + ".part")
        pack(folder, recipe, group_size, unfinished, report)
    write_note(unfinished, calibrated_with(job, len(blocks), group_size, time.monotonic() - began_s))
    unfinished.replace(packed)


def load_awq_model(job: Job) -> LoadedModel:
    """Load AWQ weights with AutoAWQ's GEMM layers, unfused.

    Fusing needs AutoAWQ's prebuilt kernels of 2024, which current torch can't load; without them AutoAWQ
    doesn't fuse.
    """
    with runnable_on(job.device):
        if job.model.is_random:
            return LoadedModel(_random_awq_model(job), None, _settings(), OPAQUE)
        checkpoint, settings = job.checkpoint, _settings()
        if checkpoint is None:
            checkpoint = str(packed_folder(job))
            settings["calibration"] = str(read_note(packed_folder(job)))
        loaded = AutoAWQForCausalLM.from_quantized(checkpoint, fuse_layers=False, device_map={"": job.device})
        return LoadedModel(loaded.model.eval(), load_tokenizer(job), settings, OPAQUE)


def _settings() -> dict[str, str]:
    """Which of AutoAWQ's three implementations a GEMM layer uses here, in AutoAWQ's order of preference."""
    kernel = "dequantize, then matmul"
    if gemm.awq_ext is not None:
        kernel = "awq_ext GEMM"
    elif gemm.TRITON_AVAILABLE:
        kernel = "Triton GEMM"
    return {"awq_kernel": kernel, "awq_fused_layers": "no"}


@contextmanager
def runnable_on(device: str) -> Iterator[None]:
    """In this context AutoAWQ loads and runs on a CPU without Intel's extension, which it would require.

    Its plain implementation, dequantize and multiply in torch, works anywhere. AutoAWQ uses it if the device
    seems to be a GPU while loading, and Triton is missing while running.
    """
    if device != "cpu":
        yield
        return
    gemm.TRITON_AVAILABLE = False
    with patch("awq.models.base.get_best_device", lambda: "cuda:0"):
        yield


def _random_awq_model(job: Job) -> PreTrainedModel:
    """The architecture with random packed integers: AWQ's shapes and bytes, straight on the device."""
    config = random_config(job.model.location)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
        for layer in model.model.layers:
            for name, linear in get_named_linears(layer).items():
                packed = gemm.WQLinear_GEMM.from_linear(linear, 4, RANDOM_GROUP_SIZE, init_only=True)
                set_op_by_name(layer, name, packed)
    outliers = job.model.outliers
    dense = random_state_dict(config, job.device, torch.float16, job.seed, outliers)
    channels = list(outlier_channels(outliers, config.hidden_size, job.seed))
    generator = torch.Generator(job.device).manual_seed(job.seed)
    for name, empty in [*model.named_parameters(), *model.named_buffers()]:
        if empty.is_meta:
            known = name in dense
            std = config.initializer_range
            value = dense[name][...] if known else random_int4_tensor(name, empty, std, generator)
            if name.removesuffix(".qweight").endswith(READERS):
                # (inputs, outputs / 8). Weights that read a planted outlier round to zero in four bits.
                value[channels] = ZERO_POINTS_OF_8
            set_module_tensor_to_device(model, name, job.device, value)
    model.tie_weights()
    return model.to(job.device).eval()
