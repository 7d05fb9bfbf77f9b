"""The bundle holds what the workers need beyond the GPU machine's own packages, and stays small."""

from pathlib import Path

import pytest

from orchestrator.errors import BadInput, QbenchError
from orchestrator.precisions import bundle
from orchestrator.precisions.bundle import bundled_requirements, write_bundle


@pytest.fixture
def pip_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What pip was asked for; instead of installing, it lays down some files of bitsandbytes and torchao."""
    calls: list[tuple[str, ...]] = []

    def fake_pip(*arguments: str) -> None:
        calls.append(arguments)
        if arguments[0] == "install":
            package = Path(arguments[arguments.index("--target") + 1], "bitsandbytes")
            (package / "__pycache__").mkdir(parents=True)
            for build in ("cpu", "cuda130", "cuda118"):
                (package / f"libbitsandbytes_{build}.so").write_bytes(b"\0" * 1000)
            for name in ("torchao/_C_cutlass_90a.abi3.so", "torchao/utils.py", "test/test_utils.py"):
                path = package.parent / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(b"#" * 1000)

    monkeypatch.setattr(bundle, "_pip", fake_pip)
    return calls


def test_it_follows_the_headers_and_leaves_out_what_is_there() -> None:
    names = {bundle._name(need) for need in bundled_requirements()}
    assert {"msgspec", "bitsandbytes", "torchao", "autoawq", "gguf", "hqq", "gemlite"} <= names
    assert not names & {"torch", "transformers", "accelerate"}


def test_it_keeps_what_the_gpu_machine_can_use(tmp_path: Path, pip_calls: list[tuple[str, ...]]) -> None:
    folder = tmp_path / "bundle"
    assert write_bundle(folder) == 3000
    kept = {path.name for path in folder.rglob("*") if path.is_file()}
    assert kept == {"libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so", "utils.py"}
    wheel, install = pip_calls
    assert {"autoawq==0.2.9", "hqq==0.2.8.post1", "gemlite==0.6.0.post2"} <= set(wheel)
    assert "3.12" in install


def test_too_large_a_bundle_fails_and_names_the_largest_file(
    tmp_path: Path, pip_calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "MOST_BYTES", 2999)
    with pytest.raises(QbenchError, match=r"over the limit.*largest file is (bitsandbytes|torchao)/"):
        write_bundle(tmp_path / "bundle")


def test_a_folder_in_use_is_left_alone(tmp_path: Path, pip_calls: list[tuple[str, ...]]) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(BadInput, match="is not empty"):
        write_bundle(tmp_path)
    assert not pip_calls
