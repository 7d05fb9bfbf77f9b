"""Contents of `results/`: small runs described by the manifest, among them all that texts quote."""

import gzip
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from orchestrator.records.store import find_records, read_run

RESULTS = ROOT / "results"
MANIFEST = tomllib.loads((RESULTS / "manifest.toml").read_text())
LIMIT_BYTES = 2_000_000
NAMED = re.compile(r"(?<![\w/])results/([\w.\-/]*\w)")
TEXTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "results/README.md"]
FOLDERS = ["docs", "benchmarks", "orchestrator", "workers", "schemas"]
SOURCES = {".md", ".py", ".toml", ".cu", ".cuh"}


def files() -> list[Path]:
    return [file for file in RESULTS.rglob("*") if file.is_file()]


def test_the_manifest_agrees_with_the_records(tmp_path: Path) -> None:
    copy = shutil.copytree(RESULTS, tmp_path / "results")
    subprocess.run([sys.executable, ROOT / "benchmarks/manifest.py", copy], check=True, cwd=ROOT)
    assert (copy / "manifest.toml").read_text() == (RESULTS / "manifest.toml").read_text()


def test_every_run_has_an_entry_that_says_what_it_shows() -> None:
    assert set(MANIFEST) == {str(file.parent.relative_to(RESULTS)) for file in find_records(RESULTS)}
    assert all(run["shows"] for run in MANIFEST.values())


def test_an_entry_names_command_commit_and_cards() -> None:
    table = MANIFEST["h100-table-7b"]
    assert table["command"] == "qbench-orchestrate --plan benchmarks/table-7b.toml -m random:qwen2.5-7b"
    assert (table["commit"], table["date"]) == ("d6f02f13b917", "2026-11-25")
    assert (table["cards"], table["cards_in_host"]) == ("1 × NVIDIA H100 80GB HBM3", 2)
    assert (table["driver"], table["torch"]) == ("580.159.04", "2.11.0")
    assert (table["rows"], table["rows_planned"]) == (79, 79)


def test_commands_name_files_that_exist() -> None:
    words = {word for run in MANIFEST.values() for word in run["command"].split() if "/" in word}
    assert words
    assert all((ROOT / word).is_file() for word in words)


def test_runs_are_small() -> None:
    assert sum(file.stat().st_size for file in files()) < LIMIT_BYTES


def test_records_are_gzipped_and_samples_are_kept_only_for_a_picture() -> None:
    assert not list(RESULTS.rglob("*.jsonl"))
    assert not list(RESULTS.rglob("*.log"))
    pictured = {str(file.parent.relative_to(RESULTS)) for file in RESULTS.rglob("*.png")}
    assert {name for name, run in MANIFEST.items() if run["samples"]} == pictured == {"h100-precisions-7b"}


@pytest.mark.parametrize("name", MANIFEST)
def test_a_run_names_no_folder_of_the_machine_that_measured_it(name: str) -> None:
    texts = [gzip.decompress(file.read_bytes()).decode() for file in (RESULTS / name).rglob("*.gz")]
    texts += [file.read_text() for file in (RESULTS / name).glob("*.json")]
    assert not any(f'"/{folder}' in text for text in texts for folder in ("root", "work", "tmp"))


@pytest.mark.parametrize("name", MANIFEST)
def test_every_run_is_quoted(name: str) -> None:
    """By its path below `results/`, or by that of a folder of several runs."""
    quoted = re.compile(rf"\b{re.escape(name)}\b(?!-)|results/{re.escape(name.partition('/')[0])}`")
    assert any(quoted.search(file.read_text()) for file in texts() if file.parent != RESULTS)


def test_every_run_that_a_text_quotes_exists() -> None:
    missing = [
        f"{file.relative_to(ROOT)}: results/{name}"
        for file, name in named_paths()
        if not (RESULTS / name).exists()
    ]
    assert missing == []


def test_the_picture_is_drawn_from_the_records() -> None:
    run = read_run(RESULTS / "h100-precisions-7b")
    assert all(cell.samples for cell in run.cells if cell.trials)


def texts() -> Iterator[Path]:
    """Documentation, and the sources whose docstrings quote figures."""
    yield from (ROOT / name for name in TEXTS)
    for folder in FOLDERS:
        yield from (file for file in (ROOT / folder).rglob("*") if file.suffix in SOURCES)


def named_paths() -> list[tuple[Path, str]]:
    """Each path below `results/` that a text names."""
    return [(file, name) for file in texts() for name in NAMED.findall(file.read_text())]
