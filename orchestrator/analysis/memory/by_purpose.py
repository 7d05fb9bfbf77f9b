"""What a model needs of memory, by meaning: weights, KV cache, activations; predicted and measured.

The allocator's ledger says what became of memory; this says what it is for. Weights and cache can be
reckoned beforehand, and are: a prediction that fails shows weights that no one knew of, or a cache that
keeps more than it must. What remains of torch's peak is activations and workspace.
"""

import msgspec

from orchestrator.analysis.memory.ledger import ledgers
from orchestrator.analysis.memory.phases import summarize_memory
from schemas.frames import Trial
from schemas.record import CellRecord


class Needs(msgspec.Struct, frozen=True, kw_only=True):
    """A cell's memory by meaning, in bytes; None for what was not measured."""

    weight_bytes: dict[str, int]
    """By kind and dtype, read off the modules: matrices, scales, zero points, and vectors like biases. By
    dtype alone in records of before kinds were told."""
    weights_predicted_bytes: int
    """Their sum: what loading should leave allocated."""
    weights_measured_bytes: int | None = None
    """`memory_allocated()` after load."""
    kv_predicted_bytes: int | None = None
    """2 × layers × key heads × head size × bytes of the dtype, for each position that the cache has room
    for: those filled, or, with a static cache, all (Pope et al. 2022, arXiv:2211.05102, §3)."""
    kv_measured_bytes: int | None = None
    """The cache's tensors at the end of the longest trial."""
    activation_bytes: int | None = None
    """Torch's peak after load, less weights and cache: activations, workspaces, buffers of a graph."""
    graph_pool_bytes: int | None = None
    """What the pools of CUDA graphs hold at the end of decode, activations of a step among it."""
    context_bytes: int | None = None
    """What the driver counts for the process before anything is in it."""


def needs(cell: CellRecord) -> Needs | None:
    """None for a cell that loaded nothing."""
    if cell.loaded is None:
        return None
    memory = summarize_memory(cell)
    weights = memory.loaded_bytes if memory.on_gpu else None
    longest = max(cell.trials, key=_positions, default=None)
    kv_bytes = longest.kv_bytes if longest else None
    peak_bytes = memory.peak_bytes if memory.on_gpu else None
    books = ledgers(cell)
    context, decode = books.get("context"), books.get("decode")
    return Needs(
        weight_bytes=cell.loaded.weight_kinds or cell.loaded.weight_bytes,
        weights_predicted_bytes=sum(cell.loaded.weight_bytes.values()),
        weights_measured_bytes=weights,
        kv_predicted_bytes=_kv_predicted(cell, longest) if longest else None,
        kv_measured_bytes=kv_bytes,
        activation_bytes=_difference(peak_bytes, weights, kv_bytes),
        graph_pool_bytes=decode.private_pool_bytes if decode else None,
        context_bytes=context.process_bytes if context else None,
    )


def _kv_predicted(cell: CellRecord, trial: Trial) -> int | None:
    if cell.loaded is None or cell.loaded.costs is None:
        return None
    static = cell.setup.cache_tokens if cell.setup else None
    depth = cell.job.workload.depth if cell.job else 0
    positions = static or depth + _positions(trial)
    return trial.batch_size * positions * cell.loaded.costs.kv_bytes_per_token


def _positions(trial: Trial) -> int:
    """Positions of the cache that a trial fills beyond its context: the last token is never fed back."""
    return trial.prompt_tokens + len(trial.token_s)


def _difference(whole: int | None, *parts: int | None) -> int | None:
    known = [part for part in parts if part is not None]
    return None if whole is None or len(known) < len(parts) else whole - sum(known)
