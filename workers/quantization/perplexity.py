"""Perplexity on text that a model was not calibrated with.

It is exp of the mean negative log-likelihood per predicted token, over one window. Two precisions of a model
are compared on the same tokens; figures from different tokenizers are not comparable.
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXTS = Path(__file__).parent / "texts"


def heldout_text() -> str:
    """Text that calibration doesn't use."""
    return (TEXTS / "heldout.txt").read_text()


@torch.inference_mode()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    """Perplexity of `text` under `model`, in one forward pass over all its tokens."""
    ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
    logits = model(ids, use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:]).exp().item()
