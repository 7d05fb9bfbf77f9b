"""Rewrite `results/manifest.toml` from the records that it describes.

    python benchmarks/manifest.py [FOLDER]

Every fact comes from the records. Only `shows`, the purpose of a run, is written by hand: it is copied from
the existing manifest, and empty for new runs.
"""

import json
import shlex
import sys
import tomllib
from pathlib import Path

from orchestrator.records.store import find_records, read_run
from schemas.record import Run

NAME = "manifest.toml"
HEADING = """\
# The runs in this folder: what each shows, the command that repeats it, and where it was measured.
# Written by `python benchmarks/manifest.py` from the records; only `shows` is edited by hand.
"""
BENCHMARKS = Path(__file__).parent
RENAMED = {"bench-gpu/prompts.txt": "three-lines.txt"}

Entry = dict[str, str | int | bool]


def today(word: str) -> str:
    """A word of a recorded command, with today's path if its file has moved to this folder."""
    name = RENAMED.get(word, word).removeprefix("results/")
    return f"{BENCHMARKS.name}/{name}" if (BENCHMARKS / name).is_file() else word


def command(run: Run) -> str:
    """The recorded command with today's paths, without options for its output."""
    words = [today(word) for word in run.plan.command if word not in ("-v", "--verbose")]
    if words[0].endswith(".py"):
        return shlex.join(["python", *words])
    if "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    if "-m" not in words and run.plan.options.model:  # the plan file may name another model today
        words.extend(["-m", run.plan.options.model])
    return shlex.join(words)


def cards(run: Run) -> str:
    """Number and name of the measured GPUs."""
    names = dict.fromkeys(
        (cell.ready.device_uuid, cell.ready.device_name) for cell in run.cells if cell.ready
    )
    (name,) = {name for _, name in names}
    return f"{len(names)} × {name}"


def version(run: Run, package: str) -> str:
    """Version of a package in the workers of this run."""
    return ", ".join(sorted({cell.ready.versions[package] for cell in run.cells if cell.ready}))


def entry(folder: Path, shows: str) -> Entry:
    """The manifest's entry for the run in this folder."""
    run = read_run(folder, samples=False)
    return {
        "shows": shows,
        "command": command(run),
        "commit": run.environment.commit or "unknown",
        "date": min(cell.started_at for cell in run.cells if cell.started_at)[:10],
        "cards": cards(run),
        "cards_in_host": len(run.environment.gpus),
        "driver": run.environment.driver or "unknown",
        "python": run.environment.python,
        "torch": version(run, "torch"),
        "transformers": version(run, "transformers"),
        "rows": len(run.cells),
        "rows_planned": len(run.plan.jobs),
        "samples": (folder / "samples").exists(),
    }


def table(name: str, facts: Entry) -> str:
    """A TOML table; its strings and numbers are written as in JSON."""
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in facts.items()]
    return "\n".join([f"[{json.dumps(name)}]", *lines, ""])


def manifest(results: Path) -> str:
    """The manifest of all runs below this folder."""
    file = results / NAME
    before = tomllib.loads(file.read_text()) if file.exists() else {}
    folders = {str(each.parent.relative_to(results)): each.parent for each in find_records(results)}
    entries = {name: entry(path, before.get(name, {"shows": ""})["shows"]) for name, path in folders.items()}
    return "\n".join([HEADING, *(table(name, facts) for name, facts in entries.items())])


if __name__ == "__main__":
    results = Path(sys.argv[1] if len(sys.argv) > 1 else "results")
    (results / NAME).write_text(manifest(results))
