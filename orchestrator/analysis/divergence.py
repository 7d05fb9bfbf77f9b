"""Where decode modes of one precision produced different tokens.

The smallest rounding difference can change a token when two logits are close, and all later tokens depend on
it. So a difference is not an error, but a reader must know that the texts differ.
"""

import msgspec

from orchestrator.records.keys import WorkloadKey, by_workload, key_of
from schemas.frames import Done
from schemas.job import DecodeMode
from schemas.record import CellRecord


class Divergence(msgspec.Struct, frozen=True, kw_only=True):
    """Where a decode mode's tokens first differ from those of eager decode of the same precision."""

    precision: str
    decode: DecodeMode
    trial: int
    """Index of the first trial that differs."""
    token: int
    """Index into its `token_ids`."""
    trials_differing: int
    trials_compared: int


def divergences(cells: list[CellRecord]) -> dict[WorkloadKey, list[Divergence]]:
    """Workload → `first_divergence` of each of its precisions."""
    return {
        key: [
            found
            for precision in dict.fromkeys(cell.precision for cell in group)
            for found in first_divergence([cell for cell in group if cell.precision == precision])
        ]
        for key, group in by_workload(cells).items()
    }


def first_divergence(cells: list[CellRecord]) -> list[Divergence]:
    """Where the tokens of cells that differ only in decode mode diverge from those of the eager one.

    Tokens are compared over the shorter length, since a budget may cut a trial short.
    """
    done = [cell for cell in cells if isinstance(cell.outcome, Done)]
    eager = next((cell for cell in done if key_of(cell).decode == "eager"), None)
    if eager is None:
        return []
    others = (cell for cell in done if key_of(cell).decode != "eager")
    return [found for cell in others if (found := _diverge(cell, eager))]


def divergence_sentence(found: Divergence) -> str:
    """Both indices count from 0, as in the records."""
    return (
        f"{found.precision} {found.decode} and eager give different tokens from token {found.token} of trial "
        f"{found.trial} ({found.trials_differing} of {found.trials_compared} trials differ)"
    )


def _diverge(cell: CellRecord, eager: CellRecord) -> Divergence | None:
    reference = {trial.index: trial.token_ids for trial in eager.trials}
    firsts = {
        trial.index: first_difference(trial.token_ids, reference[trial.index])
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


def first_difference(tokens: list[int], reference: list[int]) -> int | None:
    """Index of the first token that differs, over the shorter length; None if none does."""
    pairs = zip(tokens, reference, strict=False)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), None)
