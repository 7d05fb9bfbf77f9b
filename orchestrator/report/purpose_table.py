"""Each cell's memory by purpose: predictions next to measurements."""

from collections.abc import Iterator

import click

from orchestrator.analysis.memory.by_purpose import MemoryByPurpose
from orchestrator.report.side_by_side import Line, print_side_by_side

LINES = {
    "weights_predicted_bytes": "= weights, by their modules",
    "weights_measured_bytes": "weights, allocated by loading",
    "kv_predicted_bytes": "KV cache, by formula",
    "kv_measured_bytes": "KV cache, measured",
    "activation_bytes": "activations and workspace",
    "graph_pool_bytes": "CUDA graph pools",
    "context_bytes": "CUDA context",
}


def print_by_purpose(by_purpose: dict[str, MemoryByPurpose]) -> None:
    """`by_purpose` maps a cell's name to its memory by purpose."""
    click.echo("memory by purpose, MiB")
    print_side_by_side(by_purpose, lines(list(by_purpose.values())))


def lines(cells: list[MemoryByPurpose]) -> Iterator[Line]:
    """Weights by kind, then predictions next to measurements."""
    for kind in dict.fromkeys(kind for cell in cells for kind in cell.weight_bytes):
        yield Line(f"weights: {kind}", [cell.weight_bytes.get(kind) for cell in cells])
    for field, heading in LINES.items():
        yield Line(heading, [getattr(cell, field) for cell in cells])
