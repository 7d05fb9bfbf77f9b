"""What people read, kept once: the text of tables, notes and errors in `tests/golden/text/`.

A test asserts facts itself, and hands the words to the fixture `golden`, which compares them with the file of
that test. After a change of wording, `make golden` writes the files anew; the diff is then to be read.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "golden" / "text"

Golden = Callable[[str | Iterable[str]], None]


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Compare a text, or lines, with `golden/text/MODULE/TEST.txt`; all calls in a test share that file."""
    path = FOLDER / request.path.stem / f"{_file_name(request.node.name)}.txt"
    renew = request.config.getoption("--renew")
    told: list[str] = []

    def check(text: str | Iterable[str]) -> None:
        told.append(text if isinstance(text, str) else "\n".join(text))
        so_far = "\n---\n".join(told).rstrip("\n") + "\n"
        if renew:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(so_far)
            return
        assert path.exists(), f"no golden text {path}; write it with `make golden`"
        expected = path.read_text()
        # Of a file with more texts to come, as many as were handed over so far.
        assert so_far == "\n---\n".join(expected.split("\n---\n")[: len(told)]).rstrip("\n") + "\n"

    return check


def _file_name(test: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", test).strip("-")[:120]
