"""What the driver counts for a worker, taken apart to the last byte.

NVML says how much of the GPU a process holds; torch's caching allocator says what it asked the driver for and
what became of it. At one synchronised instant the two make a sum that comes out even:

    process = requested + rounding + pending frees + split fragments + releasable cache + outside torch

- requested: what tensors asked for;
- rounding: blocks are multiples of 512 bytes;
- pending frees: freed by Python, still awaited by a stream;
- split fragments: free parts of blocks that are in use elsewhere, which no `empty_cache()` gives back;
- releasable cache: whole free blocks, which it would;
- outside torch: what the allocator knows nothing of.

The first five are torch's `reserved`. What lies outside is told apart by when it came: with the CUDA context,
while loading, with cuBLAS (a product made for its sake), in the decode mode's set-up (a CUDA graph's own), or
in warm-up (modules that CUDA loads when a kernel is first used, Triton). What came after warm-up is the
rest, and should be nothing.

Some of `reserved` is told apart once more, since it is none of the model's: private pools, of which every
CUDA graph has one; segments that grow, where the user chose them; and cuBLAS' workspace, which most versions
of torch allocate for it (pytorch#85447), and which with others (pytorch#113994) lies outside.
"""

from itertools import pairwise

import msgspec

from schemas.frames import PhaseName, TorchMemory
from schemas.record import CellRecord, PhaseEdge

CHECKPOINTS: tuple[PhaseName, ...] = ("context", "load", "cublas", "setup", "warmup")
"""Phases at whose ends the part outside torch is read off; in the order in which a worker passes them."""


class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """Memory at the end of a phase, in bytes; the terms add up to `process_bytes`."""

    phase: PhaseName
    requested_bytes: int
    rounding_bytes: int
    pending_free_bytes: int
    split_fragment_bytes: int
    releasable_bytes: int
    outside_bytes: dict[str, int]
    """Phase in which it came, or `rest` → bytes outside torch; less than 0 where some was given back."""
    process_bytes: int
    private_pool_bytes: int | None = None
    """Of `reserved`; None in records that don't tell, as the next two."""
    expandable_bytes: int | None = None
    cublas_workspace_bytes: int | None = None

    @property
    def reserved_bytes(self) -> int:
        """What torch holds of the driver's memory."""
        return (
            self.requested_bytes
            + self.rounding_bytes
            + self.pending_free_bytes
            + self.split_fragment_bytes
            + self.releasable_bytes
        )

    @property
    def residual_bytes(self) -> int:
        """What the terms leave unexplained: 0, or the ledger is wrong."""
        return self.process_bytes - self.reserved_bytes - sum(self.outside_bytes.values())


def ledgers(cell: CellRecord) -> dict[PhaseName, Ledger]:
    """Phase → the ledger at its end, in order; of phases that recur, the last end.

    Empty where torch or NVML told nothing: on a CPU, or where a container hides pids.
    """
    found: dict[PhaseName, Ledger] = {}
    outside: dict[str, int] = {}
    workspace_bytes = None
    for start, end in pairwise(cell.edges):
        torch, process_bytes = end.phase.torch, _process_bytes(end)
        if torch is None or process_bytes is None:
            continue
        phase = start.phase.name
        # A worker's other cells lie between its first set-up and this one's: they are set-up to this cell.
        known = sum(came for name, came in outside.items() if name != phase)
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
