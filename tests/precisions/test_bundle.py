"""The bundle contains what workers need beyond the GPU machine's own packages, and stays small."""

import json
import sys
from pathlib import Path

import pytest
import uv
from golden_text import Golden
from packaging.requirements import Requirement

from orchestrator.errors import BadInput, QbenchError
from orchestrator.precisions import bundle
from orchestrator.precisions.bundle import bundled_requirements, write_bundle

FAKE_UV = f"""\
#!{sys.executable}
import json, pathlib, sys
pathlib.Path(__file__).with_name("arguments.json").write_text(json.dumps(sys.argv[1:]))
target = pathlib.Path(sys.argv[sys.argv.index("--target") + 1])
for name in ("libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so", "libbitsandbytes_cuda118.so"):
    (target / "bitsandbytes/__pycache__").mkdir(parents=True, exist_ok=True)
    (target / "bitsandbytes" / name).write_bytes(bytes(1000))
for name in ("torchao/_C_cutlass_90a.abi3.so", "torchao/utils.py", "test/test_utils.py"):
    (target / name).parent.mkdir(exist_ok=True)
    (target / name).write_bytes(bytes(1000))
"""
"""Instead of installing, it writes some files of bitsandbytes and torchao."""


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the fake uv writes its arguments to."""
    (tmp_path / "fake").mkdir()
    program = tmp_path / "fake/uv"
    program.write_text(FAKE_UV)
    program.chmod(0o755)
    monkeypatch.setattr(uv, "find_uv_bin", lambda: str(program))
    return program.with_name("arguments.json")


def test_it_has_the_headers_packages_but_not_those_of_the_machine() -> None:
    names = {Requirement(need).name for need in bundled_requirements()}
    assert {"msgspec", "bitsandbytes", "torchao", "autoawq", "gguf", "hqq", "gemlite"} <= names
    assert not names & {"torch", "transformers", "accelerate"}


def test_it_keeps_files_that_the_gpu_machine_can_use(tmp_path: Path, arguments: Path) -> None:
    folder = tmp_path / "bundle"
    assert write_bundle(folder) == 3000
    kept = {path.name for path in folder.rglob("*") if path.is_file()}
    assert kept == {"libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so", "utils.py"}
    asked = json.loads(arguments.read_text())
    assert {"autoawq==0.2.9", "hqq==0.2.8.post1", "gemlite==0.6.0.post2"} <= set(asked)
    assert {f"--no-binary={name}" for name in ("autoawq", "hqq", "gemlite")} <= set(asked)
    assert asked[asked.index("--python-version") + 1] == "3.12"


def test_an_oversized_bundle_fails_and_names_the_largest_file(
    tmp_path: Path, arguments: Path, monkeypatch: pytest.MonkeyPatch, golden: Golden
) -> None:
    (tmp_path / "fake/uv").write_text(
        FAKE_UV + '(target / "torchao/utils.py").write_bytes(bytes(39_000_000))'
    )
    monkeypatch.setattr(bundle, "MOST_BYTES", 38_000_000)
    with pytest.raises(QbenchError) as caught:
        write_bundle(tmp_path / "bundle")
    golden(str(caught.value).replace(str(tmp_path), "FOLDER"))


def test_a_folder_with_other_files_is_unchanged(tmp_path: Path, arguments: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(BadInput) as caught:
        write_bundle(tmp_path)
    assert (caught.value.option, caught.value.value) == ("FOLDER", str(tmp_path))
    assert not arguments.exists()


def test_a_failure_of_uv_is_one_line(tmp_path: Path, arguments: Path) -> None:
    (tmp_path / "fake/uv").write_text("#!/bin/sh\nexit 2\n")
    with pytest.raises(QbenchError):
        write_bundle(tmp_path / "bundle")
