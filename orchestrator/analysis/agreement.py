"""How far greedy tokens agree with a reference: the evidence on quality that raw tokens offer.

A precision that changes logits slightly repeats FP16's text until two candidates are close, and continues
with different text from there. The position is its First Divergent Token (Deiseroth et al. 2024, Divergent
Token Metrics, arXiv:2311.01544), here as a share of the generated tokens. A share of 1 proves that nothing
was lost on these prompts; a text that diverges early is not necessarily worse.
"""

from collections.abc import Iterable
from statistics import fmean

from orchestrator.analysis.divergence import first_difference
from schemas.frames import Done
from schemas.record import CellRecord


def agreements(cells: Iterable[CellRecord], references: Iterable[CellRecord]) -> dict[int, float]:
    """Index of a trial → share of its tokens before the first that differs from the reference's.

    `cells` are the rounds of one cell, and `references` those of another with the same prompts. A batch is
    judged by its first sequence, the only one whose tokens are kept. Empty for random weights, whose tokens
    are arbitrary.
    """
    ours, theirs = _answers(cells), _answers(references)
    return {at: _agreement(ours[at], theirs[at]) for at in sorted(ours.keys() & theirs.keys())}


def mean_agreement(shares: dict[int, float]) -> float | None:
    """The mean over trials of what `agreements` returns; None without any."""
    return fmean(shares.values()) if shares else None


def _answers(cells: Iterable[CellRecord]) -> dict[int, list[int]]:
    """Complete answers by trial, the same in every round. If one was cut short, its share is unknown."""
    return {
        trial.index: trial.token_ids
        for cell in cells
        if isinstance(cell.outcome, Done) and cell.job is not None and not cell.job.model.is_random
        for trial in cell.trials
        if trial.token_ids and not trial.cut_short
    }


def _agreement(tokens: list[int], reference: list[int]) -> float:
    at = first_difference(tokens, reference)
    return 1.0 if at is None else at / len(tokens)
