"""Loading through transformers, as most precisions do."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from schemas.job import Job
from workers.models import source as model_source
from workers.models.random_model import load_random_model
from workers.protocol.backend import LoadedModel


def load_transformers_model(job: Job, dtype: torch.dtype, **loading: Any) -> LoadedModel:
    """Load the job's model straight onto its device; `loading` is passed to `from_pretrained`.

    A device map with a single entry keeps accelerate from adding hooks, which would run at every layer.
    """
    if job.model.is_random:
        name, outliers = job.model.location, job.model.outliers
        model = load_random_model(name, job.device, dtype, job.seed, outliers, **loading)
        return LoadedModel(model, None)
    source = job.checkpoint or model_source.location(job)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map={"": job.device}, **loading)
    return LoadedModel(model.eval(), load_tokenizer(job))


def load_tokenizer(job: Job) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_source.location(job))
