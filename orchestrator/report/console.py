"""Where tables are printed. Plain lines need no console: they go through click and are never wrapped."""

from rich.console import Console

PAGE_COLUMNS = 120


def open_console() -> Console:
    """Stdout; as wide as a page where it is no terminal, whose width is then unknown."""
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=PAGE_COLUMNS)
