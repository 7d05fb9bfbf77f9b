"""A worker's GPU memory by NVML, broken down to the last byte.

NVML reports how much GPU memory a process holds; torch's caching allocator reports how much it got from the
driver, and in what state that memory is. Read at one synchronized instant, the two balance exactly:

    process = requested + rounding + pending frees + split fragments + releasable cache + outside torch

- requested: the sizes that tensors asked for;
- rounding: blocks are multiples of 512 bytes;
- pending frees: freed by Python, but a stream may still use them;
- split fragments: free parts of segments in partial use, which `empty_cache()` can't release;
- releasable cache: whole free segments, which it can;
- outside torch: memory that the allocator doesn't know of.

The first five are torch's `reserved`. Memory outside torch is split by the phase in which it appeared: with
the CUDA context, while loading, with cuBLAS (a multiplication is run just to initialize it), in the decode
mode's set-up (a CUDA graph's own memory), or in warm-up (modules that CUDA loads when a kernel is first used,
Triton). What appears after warm-up is the rest, and should be zero.

Parts of `reserved` that don't belong to the model are listed separately: private pools, one for each CUDA
graph; expandable segments, if the user enabled them; and the cuBLAS workspace, which most versions of torch
allocate (pytorch#85447) and others (pytorch#113994) leave to cuBLAS.
"""

from itertools import pairwise

import msgspec

from schemas.frames import PhaseName, TorchMemory
from schemas.record import CellRecord, PhaseEdge

CHECKPOINTS: tuple[PhaseName, ...] = ("context", "load", "cublas", "setup", "warmup")
"""Phases at whose ends memory outside torch is read, in the order in which a worker passes them."""


class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """Memory at the end of a phase, in bytes; the terms add up to `process_bytes`."""

    phase: PhaseName
    requested_bytes: int
    rounding_bytes: int
    pending_free_bytes: int
    split_fragment_bytes: int
    releasable_bytes: int
    outside_bytes: dict[str, int]
    """Phase in which it appeared, or `rest` → bytes outside torch; below 0 if some was released."""
    process_bytes: int
    private_pool_bytes: int | None = None
    """Part of `reserved`; None, like the next two, in records that lack it."""
    expandable_bytes: int | None = None
    cublas_workspace_bytes: int | None = None

    @property
    def reserved_bytes(self) -> int:
        """Memory that torch's allocator got from the driver."""
        return (
            self.requested_bytes
            + self.rounding_bytes
            + self.pending_free_bytes
            + self.split_fragment_bytes
            + self.releasable_bytes
        )

    @property
    def residual_bytes(self) -> int:
        """Bytes that the terms don't explain: 0 unless the ledger is wrong."""
        return self.process_bytes - self.reserved_bytes - sum(self.outside_bytes.values())


def ledgers(cell: CellRecord) -> dict[PhaseName, Ledger]:
    """Phase → the ledger at its end, in order; for recurring phases, the last end.

    Empty if torch or NVML reported nothing: on a CPU, or in a container that hides pids.
    """
    found: dict[PhaseName, Ledger] = {}
    outside: dict[str, int] = {}
    workspace_bytes = None
    for start, end in pairwise(cell.edges):
        torch, process_bytes = end.phase.torch, _process_bytes(end)
        if torch is None or process_bytes is None:
            continue
        phase = start.phase.name
        # A worker's earlier cells come between its first set-up and this one: they count as set-up here.
        known = sum(size for name, size in outside.items() if name != phase)
        added = process_bytes - torch.reserved_bytes - known
        if phase in CHECKPOINTS:
            outside[phase] = added
        if phase == "cublas" and start.phase.torch:
            workspace_bytes = torch.requested_bytes - start.phase.torch.requested_bytes
        rest = {} if phase in CHECKPOINTS else {"rest": added}
        found[phase] = _ledger(phase, torch, outside | rest, process_bytes, workspace_bytes)
    return found


def _process_bytes(edge: PhaseEdge) -> int | None:
    return edge.reading.process_bytes if edge.reading else None


def _ledger(
    phase: PhaseName,
    torch: TorchMemory,
    outside: dict[str, int],
    process_bytes: int,
    workspace_bytes: int | None,
) -> Ledger:
    return Ledger(
        phase=phase,
        requested_bytes=torch.requested_bytes,
        rounding_bytes=torch.allocated_bytes - torch.requested_bytes,
        pending_free_bytes=torch.active_bytes - torch.allocated_bytes,
        split_fragment_bytes=torch.inactive_split_bytes,
        releasable_bytes=torch.reserved_bytes - torch.active_bytes - torch.inactive_split_bytes,
        outside_bytes=outside,
        process_bytes=process_bytes,
        private_pool_bytes=torch.private_pool_bytes,
        expandable_bytes=torch.expandable_bytes,
        cublas_workspace_bytes=workspace_bytes,
    )
