"""Calibrated checkpoints in the cache, named by everything they depend on. Imports nothing heavy."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from schemas.job import Job
from workers.models import source
from workers.quantization.calibration_text import BLOCK_TOKENS, text_sha256


def is_prepared(job: Job, packed_folder: Callable[[Job], Path]) -> bool:
    """Whether `load` will find its checkpoint; random weights are packed as they are made."""
    return job.model.is_random or job.checkpoint is not None or packed_folder(job).exists()


def checkpoint_name(job: Job, quantizer_version: str) -> str:
    """24 hex digits for model, group size, calibration text and version of the library that calibrates.

    It is the same on every machine, so that a checkpoint can be copied from one to another.
    """
    folder = source.folder(job)
    parts = (
        model_fingerprint(folder),
        str(choose_group_size(folder)),
        str(BLOCK_TOKENS),
        text_sha256(job),
        quantizer_version,
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def model_fingerprint(folder: Path) -> str:
    """SHA-256 of the weights: of the GGUF they came from, otherwise of the safetensors files."""
    source_sha256 = folder / "SOURCE_SHA256"
    if source_sha256.exists():
        return source_sha256.read_text().strip()
    digest = hashlib.sha256()
    for shard in sorted(folder.glob("*.safetensors")):
        with shard.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def choose_group_size(folder: Path) -> int:
    """The largest usual group size that divides the input width of every linear layer.

    Raises `ValueError` if none does, since kernels for AWQ and GPTQ can't split a group.
    """
    config = json.loads((folder / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    attention_width = heads * (config.get("head_dim") or hidden // heads)
    widths = {hidden, config["intermediate_size"], attention_width}
    for group_size in (128, 64, 32):
        if all(width % group_size == 0 for width in widths):
            return group_size
    raise ValueError(f"groups need input widths divisible by 32; this model has {sorted(widths)}")
