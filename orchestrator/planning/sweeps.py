"""The workloads of each precision: all combinations of the options, or those of a plan file's sweeps."""

from collections.abc import Mapping
from itertools import product
from typing import Any

from orchestrator.errors import BadInput
from orchestrator.precisions.catalog import Precision, choose
from schemas.job import Workload
from schemas.options import Options, Sweep


def list_workloads(options: Options, device: str, precision: str, prompts: list[str]) -> list[Workload]:
    """Every combination of batch size, prompt length, depth, new tokens and decode mode, in this order.

    Each sweep for this precision is combined separately; a workload that occurs in several is listed once.
    """
    shared: dict[str, list[Any]] = {
        "batch_size": _listed(options.batch_size),
        "prompt_tokens": options.prompt_tokens or [None],
        "depth": options.depth or [0],
        "new_tokens": _listed(options.new_tokens),
        "decode": options.decode or (["eager"] if device == "cpu" else ["eager", "graph"]),
    }
    combinations = dict.fromkeys(
        values
        for sweep in options.workloads or [Sweep()]
        if sweep.precision is None or precision in sweep.precision
        for values in product(*(getattr(sweep, name) or some for name, some in shared.items()))
    )
    return [
        Workload(prompts=prompts, warmup=options.warmup, **dict(zip(shared, values, strict=True)))
        for values in combinations
    ]


def _listed(counts: list[int] | int) -> list[int]:
    return counts if isinstance(counts, list) else [counts]


def check_sweeps(options: Options, precisions: Mapping[str, Precision], chosen: list[Precision]) -> None:
    """Raise `BadInput` if a sweep is for a precision that isn't measured, or a precision has no sweep."""
    measured = [precision.name for precision in chosen]
    for index, sweep in enumerate(options.workloads):
        key = f"--workloads.{index}.precision"
        for each in choose(precisions, sweep.precision or [], key):
            if each.name not in measured:
                fix = f"Measure it too (-p {each.name}), or remove it here"
                raise BadInput(key, each.name, "is not measured", fix)
    for name in measured if options.workloads else []:
        if not any(sweep.precision is None or name in sweep.precision for sweep in options.workloads):
            fix = "Add one, or omit the precision"
            raise BadInput("--precision", name, "has no [[workloads]]", fix)
