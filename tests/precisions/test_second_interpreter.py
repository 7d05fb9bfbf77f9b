"""A precision under another Python: it has its own packages, borrows ours, and mixed versions are flagged.

The other environment is real, but finds torch and its dependencies through a `.pth` file, which saves
installing a gigabyte. `.pth` files in the folders that it names are not followed, so an editable install of
qbench is invisible to it.
"""

import json
import sys
import venv
from importlib.metadata import distribution, distributions, version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from commands import command, environment, run
from golden_text import Golden
from worker_runs import ROOT

from orchestrator.records.store import read_run
from schemas.frames import Done
from schemas.record import Run

pytestmark = pytest.mark.slow

OTHER_TRANSFORMERS = "5.18.999"
"""Newer than any that the workers' headers exclude, and never released."""

# Runs when a Python of the environment starts, and reports its path and imports when it exits.
PROBE = """\
import atexit, json, os, sys

def report():
    names = {"workers", "schemas", "torch"} & set(sys.modules)
    facts = {
        "packages": {name: list(sys.modules[name].__path__) for name in names},
        "path": sys.path,
        "prefix": sys.prefix,
        "PYTHONPATH": os.environ.get("PYTHONPATH"),
        "VIRTUAL_ENV": os.environ.get("VIRTUAL_ENV"),
    }
    print("PROBE", json.dumps(facts), file=sys.stderr, flush=True)

atexit.register(report)
"""


@pytest.fixture(scope="module")
def other_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that claims to have another version of transformers."""
    folder = tmp_path_factory.mktemp("other") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "probe.py").write_text(PROBE)
    folders = dict.fromkeys(str(found.locate_file("")) for found in distributions())
    (site / "all.pth").write_text("\n".join([*folders, "import probe\n"]))
    described = site / f"transformers-{OTHER_TRANSFORMERS}.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: transformers\nVersion: {OTHER_TRANSFORMERS}\n"
    )
    (described / "top_level.txt").write_text("transformers\n")
    return folder / "bin" / "python"


class Outcome(NamedTuple):
    run: Run
    printed: str
    probes: list[dict[str, Any]]
    """Reports of the worker's Python at its exit."""


@pytest.fixture(scope="module")
def outcome(other_python: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One run of two precisions: fp32 under the other Python, int8 under the parent's own."""
    place = tmp_path_factory.mktemp("second")
    (place / "leaked").mkdir()
    (place / "prompts.txt").write_text("Why is the sky blue?\nName a river.\n")
    named = ["-p", "fp32", "-p", "int8", "--python", f"fp32={other_python}", "--model", tiny_llama]
    options = ["--new-tokens", "10", "--device", "cpu", "--prompts", "prompts.txt", "--out", "run"]
    variables = {"PYTHONPATH": str(place / "leaked"), "VIRTUAL_ENV": "/parents/own"}
    done = run(command("orchestrate", *named, *options), place, environment(place / "cache", **variables))
    log = (place / "run/logs/fp32.log").read_text()
    probes = [
        json.loads(line.removeprefix("PROBE ")) for line in log.splitlines() if line.startswith("PROBE ")
    ]
    return Outcome(read_run(place / "run"), done.stdout + done.stderr, probes)


def test_each_row_comes_from_the_python_it_was_given(outcome: Outcome, other_python: Path) -> None:
    fp32, int8 = outcome.run.cells
    assert isinstance(fp32.outcome, Done), fp32.outcome
    assert fp32.ready
    assert fp32.ready.python == ".".join(map(str, sys.version_info[:3]))
    assert fp32.ready.versions["transformers"] == OTHER_TRANSFORMERS
    assert fp32.ready.versions["torch"] == version("torch")
    assert int8.ready
    assert int8.ready.versions["transformers"] == version("transformers")
    (probe,) = outcome.probes
    assert probe["prefix"] == str(other_python.parent.parent)


def test_ours_are_lent_and_nothing_else_of_the_parents(outcome: Outcome) -> None:
    (probe,) = outcome.probes
    lent = Path(probe["PYTHONPATH"])
    assert probe["packages"]["workers"] == [str(lent / "workers")]
    assert probe["packages"]["schemas"] == [str(lent / "schemas")]
    assert probe["packages"]["torch"] == [str(distribution("torch").locate_file("torch"))]
    assert probe["VIRTUAL_ENV"] is None
    assert not [path for path in probe["path"] if path in ("", str(ROOT)) or path.endswith("leaked")]
    assert not lent.exists()


def test_a_mix_of_versions_is_flagged(outcome: Outcome, golden: Golden) -> None:
    mixes = [line for line in outcome.printed.splitlines() if "differs between rows" in line]
    assert len(mixes) == 1  # torch doesn't
    assert OTHER_TRANSFORMERS in mixes[0]
    golden(mixes[0].replace(version("transformers"), "OURS"))
