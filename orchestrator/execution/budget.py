"""The time that a run may take: a budget divided among its cells, and pauses between them."""

import time


class Budget:
    """Seconds divided among the remaining cells; a cell's unused time goes to the later ones."""

    def __init__(self, total_s: float | None, cells: int) -> None:
        self.left_s = total_s
        self.cells_left = max(cells, 1)

    def next_share_s(self) -> float | None:
        """Seconds for the next cell; None without a budget."""
        share_s = None if self.left_s is None else self.left_s / self.cells_left
        self.cells_left = max(self.cells_left - 1, 1)
        return share_s

    def spend(self, seconds: float) -> None:
        """Subtract the time that a cell took."""
        if self.left_s is not None:
            self.left_s -= seconds


class Pause:
    """The cooldown before every cell but the first, so that no cell starts on a GPU heated by another."""

    def __init__(self, cooldown_s: float) -> None:
        self.next_s = 0.0
        self.cooldown_s = cooldown_s

    def wait(self) -> None:
        """Sleep before a cell: not at all before the first, `cooldown_s` before each later one."""
        time.sleep(self.next_s)
        self.next_s = self.cooldown_s
