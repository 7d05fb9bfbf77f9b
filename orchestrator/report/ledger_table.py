"""The ledgers of several cells side by side, and as bars for comparison at a glance."""

from collections.abc import Iterator

import click

from orchestrator.analysis.memory.ledger import Ledger
from orchestrator.report.side_by_side import Line, print_side_by_side
from orchestrator.units import tenths_mib

BAR_COLUMNS = 60
WITHIN_TORCH = {
    "private_pool_bytes": "CUDA graph pools",
    "expandable_bytes": "expandable segments",
    "cublas_workspace_bytes": "cuBLAS workspace",
}
OUTSIDE = {
    "context": "CUDA context",
    "load": "added while loading",
    "cublas": "added by cuBLAS",
    "setup": "added in set-up",
    "warmup": "added in warm-up",
    "rest": "added later",
}


def print_ledgers(ledgers: dict[str, Ledger], phase: str) -> None:
    """`ledgers` maps a cell's name to its ledger at the end of `phase`."""
    click.echo(f"MiB at the end of {phase}")
    print_side_by_side(ledgers, lines(list(ledgers.values())))
    for text in bars(ledgers):
        click.echo(text)


def lines(ledgers: list[Ledger]) -> Iterator[Line]:
    """Terms, their sums, and the residual, which must be 0."""
    yield Line("tensors, as requested", [ledger.requested_bytes for ledger in ledgers])
    yield Line("rounding", [ledger.rounding_bytes for ledger in ledgers])
    yield Line("pending frees", [ledger.pending_free_bytes for ledger in ledgers])
    yield Line("split fragments", [ledger.split_fragment_bytes for ledger in ledgers])
    yield Line("releasable cache", [ledger.releasable_bytes for ledger in ledgers])
    yield Line("= reserved by torch", [ledger.reserved_bytes for ledger in ledgers])
    for field, heading in WITHIN_TORCH.items():
        if any(getattr(ledger, field) for ledger in ledgers):
            yield Line(f"  of which: {heading}", [getattr(ledger, field) for ledger in ledgers])
    for name, heading in OUTSIDE.items():
        if any(name in ledger.outside_bytes for ledger in ledgers):
            yield Line(f"outside: {heading}", [ledger.outside_bytes.get(name) for ledger in ledgers])
    yield Line("= process, by NVML", [ledger.process_bytes for ledger in ledgers])
    yield Line("residual", [ledger.residual_bytes for ledger in ledgers])


def bars(ledgers: dict[str, Ledger]) -> Iterator[str]:
    """A bar per cell, all on one scale: tensors █, other memory held by torch ▓, outside torch ░."""
    longest = max((ledger.process_bytes for ledger in ledgers.values()), default=1)
    width = max(map(len, ledgers), default=0)
    for name, ledger in ledgers.items():
        ends = (ledger.requested_bytes, ledger.reserved_bytes, ledger.process_bytes)
        tensors, torch, whole = (round(BAR_COLUMNS * end / longest) for end in ends)
        drawn = "█" * tensors + "▓" * (torch - tensors) + "░" * (whole - torch)
        yield f"{name:>{width}} {drawn} {tenths_mib(ledger.process_bytes)}"
    yield f"{'':{width}} █ tensors  ▓ other torch memory  ░ outside torch"
