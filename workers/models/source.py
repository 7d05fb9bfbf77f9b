"""Resolves a ModelSource to something transformers can load, converting it at most once.

Imports nothing heavy: a worker calls `is_prepared` before it imports torch.
"""

from pathlib import Path

from schemas.job import Job
from workers.models.gguf_model import convert_gguf, converted_folder
from workers.protocol.backend import Report


def location(job: Job) -> str:
    """Folder or Hub id of this job's weights, for `from_pretrained`."""
    if job.model.kind == "gguf":
        return str(_converted(job))
    return job.model.location


def folder(job: Job) -> Path:
    """Local folder of the unquantized weights; downloads a Hub model if it isn't cached."""
    if job.model.kind == "hub":
        from huggingface_hub import snapshot_download

        wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model"]
        return Path(snapshot_download(job.model.location, allow_patterns=wanted))
    return Path(location(job))


def is_prepared(job: Job) -> bool:
    return job.model.kind != "gguf" or _converted(job).exists()


def prepare(job: Job, report: Report) -> None:
    """Convert a GGUF file to FP16 safetensors in the cache."""
    report("converting GGUF to FP16 safetensors", 0, 1)
    convert_gguf(Path(job.model.location), _converted(job))


def _converted(job: Job) -> Path:
    return converted_folder(Path(job.model.location), Path(job.cache_folder))
