"""Whether a ratio is a difference: faster, slower, the same, or indistinguishable from noise.

With few rounds a bootstrap interval is too narrow: it misses the true value more often than once in twenty.
A verdict therefore also requires Student's t on the logarithms to agree, at 2%.
"""

from typing import Literal

from orchestrator.units import percent, ratio

Verdict = Literal["faster", "slower", "same", "can't tell"]

T_LEVEL = 0.02
FEWEST_ROUNDS = 5
"""Rounds, or prompts, that a verdict requires."""
SAME = 0.02
"""If the interval is within this of 1, two precisions are the same for anyone choosing between them."""


def verdict_on(
    value: float, size: int, noun: str, low: float, high: float, p_value: float, noise_floor: float
) -> tuple[Verdict, str]:
    """The verdict on a ratio and its interval over `size` rounds or prompts (`noun`), and the reason.

    `p_value` is that of the t-test against 1, `noise_floor` by how much FP16 differed from itself.
    """
    span = f"[{low:.3f}, {high:.3f}] over {size} {noun}"
    if size < FEWEST_ROUNDS:
        return "can't tell", f"{size} {noun} are too few, at least {FEWEST_ROUNDS} are needed"
    if low >= 1 / (1 + SAME) and high <= 1 + SAME:
        return "same", f"{span} is within {percent(SAME)} of 1"
    if abs(value - 1) <= noise_floor:
        return "can't tell", f"FP16 differed from itself by {noise_floor:.1%}, at least as much"
    if low <= 1 <= high:
        return "can't tell", f"{span} includes 1"
    if p_value >= T_LEVEL:
        return "can't tell", f"{span} excludes 1, but the {noun} are too few for their variation"
    return ("faster" if value > 1 else "slower"), f"{ratio(value)} {span}"
