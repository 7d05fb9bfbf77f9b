"""What each cell's memory is for: predicted beside measured."""

from collections.abc import Iterator

import click

from orchestrator.analysis.memory.by_purpose import Needs
from orchestrator.report.side_by_side import Line, print_side_by_side

LINES = {
    "weights_predicted_bytes": "= weights, by their modules",
    "weights_measured_bytes": "weights, allocated by loading",
    "kv_predicted_bytes": "KV cache, by formula",
    "kv_measured_bytes": "KV cache, measured",
    "activation_bytes": "activations and workspace",
    "graph_pool_bytes": "pools of CUDA graphs",
    "context_bytes": "CUDA context",
}


def print_needs(needs: dict[str, Needs]) -> None:
    """`needs` maps a cell's name to what it needs."""
    click.echo("what it is for, MiB")
    print_side_by_side(needs, lines(list(needs.values())))


def lines(needs: list[Needs]) -> Iterator[Line]:
    """Weights by kind, then what is reckoned beside what was measured."""
    for kind in dict.fromkeys(kind for need in needs for kind in need.weight_bytes):
        yield Line(f"weights: {kind}", [need.weight_bytes.get(kind) for need in needs])
    for field, heading in LINES.items():
        yield Line(heading, [getattr(need, field) for need in needs])
