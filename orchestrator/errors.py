"""The errors that a user of qbench may see.

    QbenchError
     └── BadInput      an option, or the path it points to, can't be used as given

Subclasses of `QbenchError` end the command with their text on one line, without a traceback. A problem inside
a worker is not an exception here but a `Failed` frame: a row of the table.
"""


class QbenchError(Exception):
    """Base of every error that ends a command with one line instead of a traceback."""


class BadInput(QbenchError):
    """The request can't be carried out; `str()` is one line with the problem and a fix.

    `problem` and `fix` are phrases without a full stop; `fix` begins with a capital letter.
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
    """The command-line form of a field of Options: `prompt_tokens` → `--prompt-tokens`."""
    return f"--{name.replace('_', '-')}"
