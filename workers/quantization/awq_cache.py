"""Where AWQ's prepared weights lie, found by content and without importing torch."""

import hashlib
import json
from pathlib import Path

from schemas.job import Job
from workers.harness.main import Report, Unsupported
from workers.models import source as model_source
from workers.quantization.calibration_text import BLOCK_TOKENS, text_sha256

AUTOAWQ_VERSION = "0.2.9"
"""As the header of `awq` pins it. Said here too, for environments that use what another one has made."""
SHIPPED_RECIPES = Path(__file__).parent / "recipes"


def is_prepared(job: Job) -> bool:
    """Whether `load` will find its checkpoint; random weights are packed as they are made."""
    return job.model.is_random or job.checkpoint is not None or packed_folder(job).exists()


def prepare(job: Job, report: Report) -> None:
    """Make this job's checkpoint. Raises `Unsupported` in an environment without AutoAWQ."""
    try:
        from workers.quantization.awq_model import prepare_checkpoint
    except ModuleNotFoundError as error:
        raise Unsupported(
            "there are no AWQ weights of this model yet, and AutoAWQ, which makes them, isn't installed here",
            f"run qbench-worker awq --calibrate --model {job.model.location}, or name an AWQ --checkpoint",
        ) from error
    prepare_checkpoint(job, report)


def packed_folder(job: Job) -> Path:
    """Folder of this job's AWQ checkpoint in the cache."""
    return Path(job.cache_folder) / "awq-packed" / recipe_file(job).stem


def recipe_file(job: Job) -> Path:
    """This model's recipe: the one shipped with the project, else its place in the cache.

    The name stands for everything that the recipe depends on, so that a recipe made on one machine
    serves on any other.
    """
    folder = model_source.folder(job)
    parts = (
        model_fingerprint(folder),
        str(choose_group_size(folder)),
        str(BLOCK_TOKENS),
        text_sha256(job),
        AUTOAWQ_VERSION,
    )
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24] + ".safetensors"
    shipped = SHIPPED_RECIPES / name
    return shipped if shipped.exists() else Path(job.cache_folder) / "awq-recipes" / name


def model_fingerprint(folder: Path) -> str:
    """SHA-256 that identifies the weights: of the GGUF they came from, else of the safetensors files."""
    source = folder / "SOURCE_SHA256"
    if source.exists():
        return source.read_text().strip()
    digest = hashlib.sha256()
    for shard in sorted(folder.glob("*.safetensors")):
        with shard.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def choose_group_size(folder: Path) -> int:
    """The largest usual group size that divides the input width of every linear layer.

    Raises `ValueError` where none does, since kernels for AWQ and GPTQ can't split a group.
    """
    config = json.loads((folder / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    attention_width = heads * (config.get("head_dim") or hidden // heads)
    widths = {hidden, config["intermediate_size"], attention_width}
    for group_size in (128, 64, 32):
        if all(width % group_size == 0 for width in widths):
            return group_size
    raise ValueError(f"groups need input widths divisible by 32; this model has {sorted(widths)}")
