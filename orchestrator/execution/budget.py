"""The time that a run may take: a budget shared out among its cells, and pauses between them."""

import time


class Budget:
    """Seconds shared out among the cells to come; what one leaves over, the next ones get."""

    def __init__(self, total_s: float | None, cells: int) -> None:
        self.left_s = total_s
        self.cells_left = max(cells, 1)

    def next_share_s(self) -> float | None:
        """Seconds for the next cell, None where time is no object."""
        share_s = None if self.left_s is None else self.left_s / self.cells_left
        self.cells_left = max(self.cells_left - 1, 1)
        return share_s

    def spend(self, seconds: float) -> None:
        if self.left_s is not None:
            self.left_s -= seconds


class Pause:
    """The cooldown: before every cell but the first, so that none inherits the heat of another."""

    def __init__(self, cooldown_s: float) -> None:
        self.next_s = 0.0
        self.cooldown_s = cooldown_s

    def wait(self) -> None:
        time.sleep(self.next_s)
        self.next_s = self.cooldown_s
