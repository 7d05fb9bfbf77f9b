"""A KV cache of fixed size, and attention of one new token over it: what can be captured in a CUDA graph.

transformers' StaticCache gives every layer a counter of its own and a mask that is made anew at each step;
its attention copies keys and values once for every query head that shares them (GQA). That is a
hundred or two kernels of no use in every token. Here all layers write at one slot, kept beside the
cache; one additive mask opens a place a step; and the query heads of a group attend as rows of one
query. Models with another attention (sliding windows, state spaces) keep to transformers' own way.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from transformers import AttentionInterface, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from workers.generation.prompts import Batch

ALIGNMENT = 16
"""Attention kernels read masks in aligned vectors: of another length they would be copied at each step."""
GROUPED = "qbench-grouped"
"""Name of our attention among those of transformers."""
LONG_CACHE = 256
"""Positions beyond which a fused kernel, one block of threads for a key head, leaves most of a GPU idle."""


class Slot:
    """Where the next key and value go, in all layers; while `stepping` is off, layers count by themselves."""

    def __init__(self, device: torch.device) -> None:
        self.index = torch.zeros(1, dtype=torch.long, device=device)
        self.stepping = False


class SlotLayer(StaticLayer):
    """A StaticLayer that, while stepping, writes one token's key and value at the shared slot."""

    def __init__(self, max_cache_len: int, slot: Slot) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.slot = slot

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.slot.stepping:
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys.index_copy_(2, self.slot.index, key_states)
        self.values.index_copy_(2, self.slot.index, value_states)
        return self.keys, self.values


class StepState:
    """All that a decode step reads and writes beside the weights, at addresses that never change."""

    def __init__(self, model: PreTrainedModel, batches: list[Batch], new_tokens: int, grouped: bool) -> None:
        rows = batches[0].ids.shape[0]
        longest = max(batch.prompt_end for batch in batches)
        self.capacity = -(-(longest + new_tokens) // ALIGNMENT) * ALIGNMENT
        self.grouped = grouped
        zeros = partial(torch.zeros, dtype=torch.long, device=model.device)
        self.slot = Slot(model.device)
        self.token, self.position, self.made = zeros(rows, 1), zeros(rows, 1), zeros(1)
        self.tokens = zeros(rows, new_tokens)
        self.cache = StaticCache(config=model.config, max_cache_len=self.capacity)
        self.mask: torch.Tensor | None = None
        """What a step attends to: to be added, (batch, 1, 1, capacity); or 2D, (batch, capacity)."""
        if self.grouped:
            self.cache.layers = [SlotLayer(self.capacity, self.slot) for _ in self.cache.layers]
            self.mask = zeros(rows, 1, 1, self.capacity, dtype=model.dtype)
        elif any(batch.mask is not None for batch in batches):
            self.mask = zeros(rows, self.capacity)

    def reset(self, batch: Batch, mask: torch.Tensor | None) -> None:
        """Forget all tokens; `mask` has shape (batch, all tokens to be), None where rows aren't padded."""
        self.cache.reset()
        self.slot.stepping = False
        if self.mask is None:
            return
        seen = torch.ones_like(self.mask, dtype=torch.bool)
        if mask is not None:
            seen[..., : batch.prompt_end] = mask[:, : batch.prompt_end].view(*self.mask.shape[:-1], -1).bool()
        if self.grouped:
            seen[..., batch.prompt_end :] = False
            self.mask.zero_().masked_fill_(~seen, float("-inf"))
        else:
            self.mask.copy_(seen)

    def start(self, batch: Batch, token: torch.Tensor, position: torch.Tensor) -> None:
        """Take each row's first token, shape (batch, 1), and the position it has; steps follow."""
        self.token.copy_(token)
        self.position.copy_(position)
        self.slot.index.fill_(batch.prompt_end)
        self.made.fill_(1)
        self.tokens[:, :1] = token
        self.slot.stepping = True

    def open_slot(self) -> None:
        """Let the token of this step be attended to, by itself and from now on."""
        if self.grouped:
            self.mask.index_fill_(3, self.slot.index, 0.0)

    def advance(self, token: torch.Tensor) -> None:
        """Take each row's next token, and move on by one."""
        self.token.copy_(token)
        self.tokens.index_copy_(1, self.made, token)
        for counter in (self.position, self.slot.index, self.made):
            counter.add_(1)


def can_group(model: PreTrainedModel) -> bool:
    """Whether every layer has plain attention, by the cache it gets, through torch's scaled dot product."""
    layers = StaticCache(config=model.config, max_cache_len=1).layers
    return model.config._attn_implementation == "sdpa" and {type(layer) for layer in layers} == {StaticLayer}


@contextmanager
def grouped_attention_in(model: PreTrainedModel) -> Iterator[bool]:
    """Let one-token steps of `model` go through grouped attention, and tell whether they can."""
    if not can_group(model):
        yield False
        return
    usual = model.config._attn_implementation
    model.set_attn_implementation(GROUPED)
    try:
        yield True
    finally:
        model.set_attn_implementation(usual)


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention of one new token a row; longer queries go to transformers' own.

    query has shape (batch, heads, 1, width), key and value (batch, key heads, cache, width), the mask
    (batch, 1, 1, cache), to be added. Returns shape (batch, 1, heads, width).
    """
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    rows, heads, _, width = query.shape
    key_heads = key.shape[1]
    grouped = query.reshape(rows, key_heads, heads // key_heads, width)
    scale = width**-0.5 if scaling is None else scaling
    if torch.compiler.is_compiling():
        attend = _attention_written_out
    else:
        attend = _attention_by_products if key.is_cuda and key.shape[2] > LONG_CACHE else _fused_attention
    return attend(grouped, key, value, attention_mask, scale).reshape(rows, 1, heads, width), None


def _fused_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _attention_by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """The same as two batched matrix products, for which cuBLAS shares a long cache out among many blocks.

    After 2,048 tokens Qwen2.5-7B in FP16 decodes at 126 tok/s so, against 99 through the fused kernel (one
    H100). Scores stay in float32, as they do inside that kernel.
    """
    scores = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), out_dtype=torch.float32)
    weights = torch.add(mask, scores.view(*query.shape[:-1], -1), alpha=scale).softmax(-1)
    return torch.bmm(weights.to(value.dtype).flatten(0, 1), value.flatten(0, 1)).view_as(query)


def _attention_written_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """The same as multiplications and sums, which torch.compile fuses into three kernels.

    Handed to it whole, attention would be a batched matrix product of a few rows: kernels made for many.
    """
    scores = (query.unsqueeze(3).float() * key.unsqueeze(2).float()).sum(-1) * scale + mask.float()
    weights = scores.softmax(-1)
    return (weights.unsqueeze(-1) * value.unsqueeze(2).float()).sum(3).to(query.dtype)


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
