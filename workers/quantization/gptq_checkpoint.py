"""GPTQ checkpoints that GPTQModel calibrates, kept by content and found without importing torch."""

import contextlib
import hashlib
import importlib.metadata
import os
import time
from pathlib import Path

from schemas.job import Job
from workers.harness.main import Report
from workers.models import source as model_source
from workers.quantization.awq_cache import choose_group_size, model_fingerprint
from workers.quantization.calibration_text import (
    BLOCK_TOKENS,
    calibrated_with,
    samples,
    text_sha256,
    write_note,
)


def is_prepared(job: Job) -> bool:
    """Whether `load` will find its checkpoint; random weights are packed as they are made."""
    return job.model.is_random or job.checkpoint is not None or packed_folder(job).exists()


def packed_folder(job: Job) -> Path:
    """Folder of this job's GPTQ checkpoint in the cache; its name stands for all that it depends on."""
    folder = model_source.folder(job)
    parts = (
        model_fingerprint(folder),
        str(choose_group_size(folder)),
        str(BLOCK_TOKENS),
        text_sha256(job),
        importlib.metadata.version("gptqmodel"),
    )
    return Path(job.cache_folder) / "gptq" / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def prepare(job: Job, report: Report) -> None:
    """Calibrate this job's model on its device, with the samples that `awq` would be calibrated with."""
    os.environ.setdefault("GPTQMODEL_OFFLINE", "1")  # it would fetch sources of a kernel that we don't use
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on a CPU, more get into each other's way
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from transformers import AutoTokenizer

    report("calibrating with GPTQ", 0, 1)
    began_s = time.monotonic()
    folder, packed = model_source.folder(job), packed_folder(job)
    blocks, group_size = samples(job, AutoTokenizer.from_pretrained(folder)), choose_group_size(folder)
    config = QuantizeConfig(bits=4, group_size=group_size, sym=True, desc_act=False, device=job.device)
    model = GPTQModel.load(str(folder), config, dtype=torch.float16)
    packed.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(packed.parent):  # it leaves a folder of logs where it runs
        model.quantize([{"input_ids": block, "attention_mask": [1] * BLOCK_TOKENS} for block in blocks])
    unfinished = packed.with_name(packed.name + ".part")
    model.save(str(unfinished))
    write_note(unfinished, calibrated_with(job, len(blocks), group_size, time.monotonic() - began_s))
    unfinished.replace(packed)
