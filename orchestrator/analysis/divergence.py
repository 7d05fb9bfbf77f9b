"""Where decode modes of one precision gave different tokens.

The least difference in rounding makes another token where two logits lie close, and every later one depends
on it. So a difference is no fault by itself, but a reader must know that the texts are not the same.
"""

import msgspec

from orchestrator.records.keys import by_workload, key_of
from schemas.frames import Done
from schemas.job import DecodeMode
from schemas.record import CellRecord


class Divergence(msgspec.Struct, frozen=True, kw_only=True):
    """Where a decode mode first gave other tokens than eager decode of the same precision did."""

    precision: str
    decode: DecodeMode
    trial: int
    """Index of the first trial that differs."""
    token: int
    """Index into its `token_ids`."""
    trials_differing: int
    trials_compared: int


def divergences(cells: list[CellRecord]) -> list[Divergence]:
    """`first_divergence` of every precision and workload among these cells."""
    found = []
    for group in by_workload(cells).values():
        for precision in dict.fromkeys(cell.precision for cell in group):
            found += first_divergence([cell for cell in group if cell.precision == precision])
    return found


def first_divergence(cells: list[CellRecord]) -> list[Divergence]:
    """Where cells that differ in decode mode only gave other tokens than the eager one among them.

    Tokens are compared over the shorter length, since a budget may cut a trial short.
    """
    done = [cell for cell in cells if isinstance(cell.outcome, Done)]
    eager = next((cell for cell in done if key_of(cell).decode == "eager"), None)
    if eager is None:
        return []
    others = (cell for cell in done if key_of(cell).decode != "eager")
    return [found for cell in others if (found := _diverge(cell, eager))]


def divergence_sentence(found: Divergence) -> str:
    """Both indexes count from 0, as in the records."""
    return (
        f"{found.precision} {found.decode} and eager give different tokens from token {found.token} of trial "
        f"{found.trial} on ({found.trials_differing} of {found.trials_compared} trials differ)"
    )


def _diverge(cell: CellRecord, eager: CellRecord) -> Divergence | None:
    reference = {trial.index: trial.token_ids for trial in eager.trials}
    firsts = {
        trial.index: first_other(trial.token_ids, reference[trial.index])
        for trial in cell.trials
        if trial.index in reference
    }
    differing = {trial: token for trial, token in firsts.items() if token is not None}
    if not differing:
        return None
    return Divergence(
        precision=cell.precision,
        decode=key_of(cell).decode,
        trial=min(differing),
        token=differing[min(differing)],
        trials_differing=len(differing),
        trials_compared=len(firsts),
    )


def first_other(tokens: list[int], reference: list[int]) -> int | None:
    """Index of the first token that differs, over the shorter length; None where none does."""
    pairs = zip(tokens, reference, strict=False)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), None)
