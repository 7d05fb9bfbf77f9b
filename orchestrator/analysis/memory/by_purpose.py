"""Memory by purpose: weights, KV cache, activations; predicted and measured.

The ledger shows what state memory is in; this shows what it is for. Weights and cache can be predicted,
and a failed prediction reveals unknown weights, or a cache that keeps more than it must. The rest of torch's
peak is activations and workspace.
"""

import msgspec

from orchestrator.analysis.memory.ledger import Ledger
from orchestrator.analysis.memory.phases import MemorySummary
from schemas.frames import PhaseName, Trial
from schemas.record import CellRecord


class MemoryByPurpose(msgspec.Struct, frozen=True, kw_only=True):
    """A cell's memory by purpose, in bytes; None if not measured."""

    weight_bytes: dict[str, int]
    """By kind and dtype, read from the modules: matrices, scales, zero points, and vectors such as biases. By
    dtype alone in records from before kinds were recorded."""
    weights_predicted_bytes: int
    """Their sum: the memory that should be allocated after loading."""
    weights_measured_bytes: int | None = None
    """`memory_allocated()` after load."""
    kv_predicted_bytes: int | None = None
    """2 × layers × key heads × head size × bytes of the dtype, for each position of the cache: those filled,
    or its whole capacity if it is static (Pope et al. 2022, arXiv:2211.05102, §3)."""
    kv_measured_bytes: int | None = None
    """The cache's tensors at the end of the longest trial."""
    activation_bytes: int | None = None
    """Torch's peak after load, less weights and cache: activations, workspaces, graph buffers."""
    graph_pool_bytes: int | None = None
    """Memory in CUDA graph pools at the end of decode, including the activations of a step."""
    context_bytes: int | None = None
    """The process's memory by NVML before anything else is allocated."""


def memory_by_purpose(
    cell: CellRecord, memory: MemorySummary, ledgers: dict[PhaseName, Ledger]
) -> MemoryByPurpose | None:
    """None for a cell that loaded nothing. `memory` and `ledgers` are those of the cell."""
    if cell.loaded is None:
        return None
    weights = memory.loaded_bytes if memory.on_gpu else None
    longest = max(cell.trials, key=_positions, default=None)
    kv_bytes = longest.kv_bytes if longest else None
    peak_bytes = memory.peak_bytes if memory.on_gpu else None
    context, decode = ledgers.get("context"), ledgers.get("decode")
    return MemoryByPurpose(
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
    """Cache positions that a trial fills beyond its context: the last token is never fed back."""
    return trial.prompt_tokens + len(trial.token_s)


def _difference(whole: int | None, *parts: int | None) -> int | None:
    known = [part for part in parts if part is not None]
    return None if whole is None or len(known) < len(parts) else whole - sum(known)
