"""The console for tables. Plain lines are printed by click instead, and are never wrapped."""

from rich import console

PAGE_COLUMNS = 120


class Console(console.Console):
    """A console without markup, which leaves a closed pipe to the command: `| head` is no failure."""

    def __init__(self, width: int | None = None) -> None:
        super().__init__(highlight=False, markup=False, width=width)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def open_console() -> Console:
    """Stdout, with the width of a page if it isn't a terminal."""
    stdout = Console()
    return stdout if stdout.is_terminal else Console(PAGE_COLUMNS)
