"""Limits that a second run must satisfy: `--fail-if` of `qbench-compare`, a gate for CI.

A limit is broken if the whole interval is beyond it. With few rounds an interval is too narrow (see
`orchestrator.analysis.intervals`), so the limit is then undecided: reported, but not broken.
"""

import re
from dataclasses import dataclass

from orchestrator.analysis.comparison.compare import EXACT, FIGURES, QUALITY, TOKENS, Pair
from orchestrator.analysis.verdicts import FEWEST_ROUNDS
from orchestrator.errors import BadInput

_ALL = (*FIGURES, QUALITY, TOKENS)
_LIMIT = re.compile(rf"(?P<figure>{'|'.join(_ALL)})(?P<sign>[<>])(?P<limit>\d*\.?\d+)")


@dataclass(frozen=True)
class Limit:
    """`decode<0.95`: fail if the second run's decode is below 0.95 of the first's, beyond the noise."""

    figure: str
    below: bool
    limit: float
    text: str

    def is_broken(self, pair: Pair) -> bool:
        """Whether the whole interval is beyond the limit; exact figures need no interval."""
        found = pair.comparison
        nearest = found.high if self.below else found.low
        beyond = self._is_beyond(found.ratio if nearest is None else nearest)
        return pair.figure == self.figure and beyond and not self._too_few(pair)

    def is_undecided(self, pair: Pair) -> bool:
        """Whether the ratio is beyond the limit, but from too few rounds or prompts to decide."""
        return pair.figure == self.figure and self._is_beyond(pair.comparison.ratio) and self._too_few(pair)

    def _is_beyond(self, value: float) -> bool:
        return value < self.limit if self.below else value > self.limit

    def _too_few(self, pair: Pair) -> bool:
        return self.figure not in EXACT and pair.comparison.rounds < FEWEST_ROUNDS


def parse_limit(text: str) -> Limit:
    """Parse the value of `--fail-if`. Raises `BadInput`."""
    match = _LIMIT.fullmatch(text.replace(" ", ""))
    if match is None:
        raise BadInput(
            "--fail-if", text, "is not a valid limit", f"Write e.g. decode<0.95; figures: {', '.join(_ALL)}"
        )
    return Limit(match["figure"], match["sign"] == "<", float(match["limit"]), text)
