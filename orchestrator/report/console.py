"""The console for tables. Plain lines are printed by click instead, and are never wrapped."""

from rich.console import Console

PAGE_COLUMNS = 120


def open_console() -> Console:
    """Stdout, with the width of a page if it isn't a terminal."""
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=PAGE_COLUMNS)
