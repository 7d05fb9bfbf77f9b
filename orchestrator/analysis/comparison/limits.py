"""Limits that a second run must keep: `--fail-if` of `qbench-compare`, a gate for CI.

A limit is broken where the whole interval lies beyond it. Of few rounds an interval is too narrow (see
`orchestrator.analysis.intervals`), so that they break none, but may be said to.
"""

import re
from dataclasses import dataclass

from orchestrator.analysis.comparison.compare import EXACT, FIGURES, QUALITY, TOKENS, Pair
from orchestrator.analysis.intervals import FEWEST_ROUNDS
from orchestrator.errors import BadInput

_ALL = (*FIGURES, QUALITY, TOKENS)
_LIMIT = re.compile(rf"(?P<figure>{'|'.join(_ALL)})(?P<sign>[<>])(?P<limit>\d*\.?\d+)")


@dataclass(frozen=True)
class Limit:
    """`decode<0.95`: fail where the second run's decode is under 0.95 of the first's, beyond the noise."""

    figure: str
    below: bool
    limit: float
    text: str

    def is_broken(self, pair: Pair) -> bool:
        """Whether the whole interval lies beyond the limit; exact figures of one round have and need none."""
        found = pair.comparison
        nearest = found.high if self.below else found.low
        beyond = self._is_beyond(found.ratio if nearest is None else nearest)
        return pair.figure == self.figure and beyond and not self._too_few(pair)

    def is_open(self, pair: Pair) -> bool:
        """Whether too few rounds, or prompts, can't tell if it is broken, though it looks so."""
        return pair.figure == self.figure and self._is_beyond(pair.comparison.ratio) and self._too_few(pair)

    def _is_beyond(self, value: float) -> bool:
        return value < self.limit if self.below else value > self.limit

    def _too_few(self, pair: Pair) -> bool:
        return self.figure not in EXACT and pair.comparison.rounds < FEWEST_ROUNDS


def parse_limit(text: str) -> Limit:
    """Read what stands after `--fail-if`. Raises `BadInput`."""
    match = _LIMIT.fullmatch(text.replace(" ", ""))
    if match is None:
        raise BadInput(
            "--fail-if", text, "is no limit", f"Write e.g. decode<0.95; figures: {', '.join(_ALL)}"
        )
    return Limit(match["figure"], match["sign"] == "<", float(match["limit"]), text)
