"""The errors that a user of qbench may meet.

    QbenchError
     └── BadInput      an option, or the place it points to, can't be used as given

Whatever derives from `QbenchError` ends the run with its text on one line and no traceback. What goes
wrong inside a worker is no exception here but a `Failed` frame: a row of the table.
"""


class QbenchError(Exception):
    """Base of every error that ends a run with one line instead of a traceback."""


class BadInput(QbenchError):
    """What was asked for can't be done; `str()` is one line that says what to do instead.

    `problem` and `fix` are phrases without a full stop, `fix` beginning with a capital letter.
    """

    def __init__(self, option: str, value: str, problem: str, fix: str) -> None:
        super().__init__(option, value, problem, fix)
        self.option = option
        self.value = value
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        line = f"{f'{self.option} {self.value}'.strip()}: {self.problem}. {self.fix}."
        return " ".join(line.split())


def flag(name: str) -> str:
    """A field of Options as it is typed: `prompt_tokens` → `--prompt-tokens`."""
    return f"--{name.replace('_', '-')}"
