"""A precision under another Python: its packages are its own, ours are lent, and a mix is flagged.

The other environment is a real one. It finds torch and the like through a `.pth` file, which saves an
install of a gigabyte; `.pth` files in what it finds there are not followed, so an editable install of
qbench is as unknown to it as to any stranger.
"""

import json
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from worker_runs import ROOT, environment

from orchestrator.records.store import read_run
from schemas.frames import Done
from schemas.record import Run

pytestmark = pytest.mark.slow

OTHER_TRANSFORMERS = "5.18.999"
"""Newer than any that the workers' headers rule out, and no version that was ever released."""

# Runs at the start of every Python of the environment, and tells at its end what it was and had imported.
PROBE = """\
import atexit, json, os, sys

def tell():
    names = {"workers", "schemas", "torch"} & set(sys.modules)
    told = {
        "packages": {name: list(sys.modules[name].__path__) for name in names},
        "path": sys.path,
        "prefix": sys.prefix,
        "PYTHONPATH": os.environ.get("PYTHONPATH"),
        "VIRTUAL_ENV": os.environ.get("VIRTUAL_ENV"),
    }
    print("PROBE", json.dumps(told), file=sys.stderr, flush=True)

atexit.register(tell)
"""


@pytest.fixture(scope="module")
def other_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of an environment that believes in another version of transformers."""
    folder = tmp_path_factory.mktemp("other") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "probe.py").write_text(PROBE)
    (site / "all.pth").write_text(f"{sysconfig.get_path('purelib')}\nimport probe\n")
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
    """What the worker's Python told of itself as it ended."""


@pytest.fixture(scope="module")
def outcome(other_python: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One run of two precisions: fp32 under the other Python, int8 under the parent's own."""
    place = tmp_path_factory.mktemp("second")
    (place / "leaked").mkdir()
    (place / "prompts.txt").write_text("Why is the sky blue?\nName a river.\n")
    done = subprocess.run(
        [
            *(Path(sys.executable).with_name("qbench-orchestrate"), "-p", "fp32", "-p", "int8"),
            *("--python", f"fp32={other_python}", "--model", tiny_llama, "--new-tokens", "10"),
            *("--device", "cpu", "--prompts", "prompts.txt", "--out", "run"),
        ],
        cwd=place,
        env=environment(
            QBENCH_CACHE=str(place / "cache"), PYTHONPATH=str(place / "leaked"), VIRTUAL_ENV="/parents/own"
        ),
        capture_output=True,
        text=True,
        timeout=300,
    )
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


def test_our_packages_are_lent_and_nothing_else_of_the_parents(outcome: Outcome) -> None:
    (probe,) = outcome.probes
    lent = Path(probe["PYTHONPATH"])
    assert probe["packages"]["workers"] == [str(lent / "workers")]
    assert probe["packages"]["schemas"] == [str(lent / "schemas")]
    assert probe["packages"]["torch"] == [str(Path(sysconfig.get_path("purelib")) / "torch")]
    assert probe["VIRTUAL_ENV"] is None
    assert not [path for path in probe["path"] if path in ("", str(ROOT)) or path.endswith("leaked")]
    assert not lent.exists()


def test_a_mix_of_versions_is_flagged(outcome: Outcome) -> None:
    here = version("transformers")
    mix = f"transformers differs between rows: {OTHER_TRANSFORMERS} in fp32; {here} in int8"
    assert mix in outcome.printed
    assert "torch differs" not in outcome.printed
