"""GPTQ checkpoints calibrated by GPTQModel, cached by content and found without importing torch."""

import contextlib
import importlib.metadata
import os
import time
from pathlib import Path

from schemas.job import Job
from workers.models import source as model_source
from workers.protocol.backend import Report
from workers.quantization import checkpoint_cache
from workers.quantization.calibration_text import (
    BLOCK_TOKENS,
    calibrated_with,
    samples,
    write_note,
)


def is_prepared(job: Job) -> bool:
    return checkpoint_cache.is_prepared(job, packed_folder)


def packed_folder(job: Job) -> Path:
    """Folder of this job's GPTQ checkpoint in the cache."""
    name = checkpoint_cache.checkpoint_name(job, importlib.metadata.version("gptqmodel"))
    return Path(job.cache_folder) / "gptq" / name


def prepare(job: Job, report: Report) -> None:
    """Calibrate this job's model on its device, with the same samples as `awq`."""
    os.environ.setdefault("GPTQMODEL_OFFLINE", "1")  # or it fetches sources of an unused kernel
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on a CPU, more slow each other down
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from transformers import AutoTokenizer

    report("calibrating with GPTQ", 0, 1)
    began_s = time.monotonic()
    folder, packed = model_source.folder(job), packed_folder(job)
    blocks, group_size = (
        samples(job, AutoTokenizer.from_pretrained(folder)),
        checkpoint_cache.choose_group_size(folder),
    )
    config = QuantizeConfig(bits=4, group_size=group_size, sym=True, desc_act=False, device=job.device)
    model = GPTQModel.load(str(folder), config, dtype=torch.float16)
    packed.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(packed.parent):  # it leaves a log folder in the working directory
        model.quantize([{"input_ids": block, "attention_mask": [1] * BLOCK_TOKENS} for block in blocks])
    unfinished = packed.with_name(packed.name + ".part")
    model.save(str(unfinished))
    write_note(unfinished, calibrated_with(job, len(blocks), group_size, time.monotonic() - began_s))
    unfinished.replace(packed)
