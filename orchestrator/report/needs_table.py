"""What each cell's memory is for: predicted beside measured."""

import click
from rich.box import SIMPLE_HEAD
from rich.table import Table

from orchestrator.needs import Needs
from orchestrator.report.console import open_console
from orchestrator.units import mib, tenths_mib

HEADINGS = (
    ("weights in the modules", "weights_predicted_bytes"),
    ("allocated by loading", "weights_measured_bytes"),
    ("KV cache by formula", "kv_predicted_bytes"),
    ("KV cache measured", "kv_measured_bytes"),
    ("activations, workspace", "activation_bytes"),
)


def print_needs(needs: dict[str, Needs]) -> None:
    """`needs` maps a cell's name to what it needs."""
    click.echo("what it is for, MiB")
    table = Table(box=SIMPLE_HEAD)
    table.add_column("")
    for heading, _ in HEADINGS:
        table.add_column(heading, justify="right")
    table.add_column("weights by dtype")
    for name, need in needs.items():
        figures = (tenths_mib(getattr(need, field)) for _, field in HEADINGS)
        dtypes = ", ".join(f"{dtype} {mib(size)}" for dtype, size in need.weight_bytes.items())
        table.add_row(name, *figures, dtypes)
    open_console().print(table)
