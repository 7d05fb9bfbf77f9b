"""Golden texts: the tables, notes and errors that people read, kept in `tests/golden/text/`.

A test asserts facts itself, and passes sentences to the fixture `golden`, which compares them with that
test's file. After a change of wording, `make golden` rewrites the files; read the diff before you commit it.
"""

import re
from collections.abc import Callable, Iterable
from difflib import unified_diff
from pathlib import Path

import pytest

from orchestrator.planning.models import random_names
from orchestrator.precisions.catalog import find_precisions
from schemas.options import Options, Sweep

FOLDER = Path(__file__).parent / "golden" / "text"

Golden = Callable[[str | Iterable[str]], None]


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Compare a text, or lines, with `golden/text/MODULE/TEST.txt`; all calls in a test share that file."""
    path = FOLDER / request.path.stem / f"{_file_name(request.node.name)}.txt"
    renew = request.config.getoption("--renew")
    texts: list[str] = []

    def check(text: str | Iterable[str]) -> None:
        texts.append(text if isinstance(text, str) else "\n".join(text))
        so_far = "\n---\n".join(texts).rstrip("\n") + "\n"
        if renew:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(so_far)
            return
        assert path.exists(), f"no golden text {path}; write it with `make golden`"
        expected = path.read_text()
        # The file may contain texts that the test has not passed yet.
        stored = "\n---\n".join(expected.split("\n---\n")[: len(texts)]).rstrip("\n") + "\n"
        difference = "\n".join(unified_diff(stored.splitlines(), so_far.splitlines(), str(path), "now", n=0))
        assert not difference, difference

    return check


def without_names(text: str) -> str:
    """`text` without the lists of all precisions, models and options, which grow with the project."""
    precisions = find_precisions()
    calibrated = [precision.name for precision in precisions.values() if precision.calibrated]
    for names in (precisions, calibrated, random_names()):
        text = text.replace(", ".join(names), "…")
    for struct in (Options, Sweep):
        text = text.replace(", ".join(struct.__struct_fields__).replace("_", "-"), "…")
    return text


def _file_name(test: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", test).strip("-")[:120]
