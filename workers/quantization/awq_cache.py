"""Locations of a job's AWQ recipe and packed weights. Imports nothing heavy."""

from pathlib import Path

from schemas.job import Job
from workers.quantization import checkpoint_cache

AUTOAWQ_VERSION = "0.2.9"
"""As pinned by the header of `awq`; repeated for environments without AutoAWQ, which only read weights."""
SHIPPED_RECIPES = Path(__file__).parent / "recipes"


def is_prepared(job: Job) -> bool:
    return checkpoint_cache.is_prepared(job, packed_folder)


def packed_folder(job: Job) -> Path:
    """Folder of this job's AWQ checkpoint in the cache."""
    return Path(job.cache_folder) / "awq-packed" / recipe_file(job).stem


def recipe_file(job: Job) -> Path:
    """This model's recipe: the one shipped with the project, or its path in the cache."""
    name = checkpoint_cache.checkpoint_name(job, AUTOAWQ_VERSION) + ".safetensors"
    shipped = SHIPPED_RECIPES / name
    return shipped if shipped.exists() else Path(job.cache_folder) / "awq-recipes" / name
