"""Prompts as batches of token ids, the input of trials."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from schemas.job import Job, Workload
from workers.models.random_model import random_prompt_ids

RANDOM_PROMPT_TOKENS = 64
"""Length of a random model's prompts if the job doesn't set it."""


class Batch(NamedTuple):
    """Token ids, shape (batch, tokens), and a mask of the same shape if prompts were padded.

    `context`, shape (batch, depth), precedes them.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    context: torch.Tensor | None = None

    @property
    def depth(self) -> int:
        return 0 if self.context is None else self.context.shape[1]

    @property
    def prompt_end(self) -> int:
        """Number of tokens before the first generated one: context, padding and prompt."""
        return self.depth + self.ids.shape[1]


def make_batches(job: Job, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> list[Batch]:
    """All prompts of the job in batches of equal size; the last is completed with the first prompts."""
    workload = job.workload
    if tokenizer is None:
        prompts = list(_random_prompts(workload, vocabulary, job.seed))
        padding = 0
    else:
        prompts = [_encode(tokenizer, text, workload.prompt_tokens) for text in workload.prompts]
        padding = tokenizer.pad_token_id or 0
    size = workload.batch_size
    missing = -len(prompts) % size
    prompts += [prompts[index % len(prompts)] for index in range(missing)]
    context = _context(workload, tokenizer, vocabulary, job.seed)
    return [
        _batch(prompts[start : start + size], padding)._replace(context=context)
        for start in range(0, len(prompts), size)
    ]


def _context(
    workload: Workload, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int, seed: int
) -> torch.Tensor | None:
    """The text of all prompts, repeated, or random tokens; the same in every row."""
    if not workload.depth:
        return None
    if tokenizer is None:
        ids = random_prompt_ids(vocabulary, workload.depth, seed - 1)
    else:
        ids = _exactly(tokenizer(" ".join(workload.prompts)).input_ids, workload.depth)
    return torch.tensor([ids] * workload.batch_size)


def _random_prompts(workload: Workload, vocabulary: int, seed: int) -> Iterator[list[int]]:
    length = workload.prompt_tokens or RANDOM_PROMPT_TOKENS
    for index in range(len(workload.prompts)):
        yield random_prompt_ids(vocabulary, length, seed + index)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, prompt_tokens: int | None) -> list[int]:
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
    else:
        ids = tokenizer(text).input_ids
    return ids if prompt_tokens is None else _exactly(ids, prompt_tokens)


def _exactly(ids: list[int], length: int) -> list[int]:
    repeats = -(-length // len(ids))
    return (ids * repeats)[:length]


def _batch(prompts: list[list[int]], padding: int) -> Batch:
    # Padded on the left, so that generation continues every row at its last position.
    width = max(map(len, prompts))
    ids = torch.tensor([[padding] * (width - len(prompt)) + prompt for prompt in prompts])
    if all(len(prompt) == width for prompt in prompts):
        return Batch(ids, None)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return Batch(ids, mask)
