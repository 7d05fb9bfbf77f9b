"""What an environment of its own borrows: what fits, with all that it needs in turn, and nothing else."""

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from orchestrator.precisions.borrowing import find_borrowable, link_borrowed


@pytest.fixture
def parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the parent's packages: `big 2.0` needs `small`, and, with its extra, `odd`."""
    folder = tmp_path / "parents"
    folder.mkdir()
    install(
        folder, "qbig", "2.0+cu130", "qsmall>=1", 'qodd; extra == "more"', 'qwin; sys_platform == "win32"'
    )
    install(folder, "qsmall", "1.1", "qbig")  # packages may need each other
    install(folder, "qodd", "0.1")
    install(folder, "qwin", "1.0")
    install(folder, "qbare", "1.0")
    (folder / "qbare-1.0.dist-info" / "RECORD").unlink()
    install(folder, "qedit", "1.0")
    (folder / "qedit-1.0.dist-info" / "direct_url.json").write_text(
        '{"dir_info": {"editable": true}, "url": "file:///src"}'
    )
    monkeypatch.syspath_prepend(folder)
    return folder


def install(folder: Path, name: str, version: str, *needs: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"]
    (info / "METADATA").write_text("".join([*lines, *(f"Requires-Dist: {need}\n" for need in needs)]))
    (folder / name).mkdir()
    (folder / name / "__init__.py").touch()
    files = [f"{name}/__init__.py", f"{name}.libs/a.so", f"{info.name}/METADATA"]
    files += ["../../../bin/tool", "__pycache__/x.pyc", "/etc/x"]
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def names(*needs: str) -> set[str]:
    return set(find_borrowable(map(Requirement, needs)))


@pytest.mark.parametrize(
    ("needs", "borrowed"),
    [
        (["qbig>=1"], {"qbig", "qsmall"}),
        (["QBig[more]==2.0"], {"qbig", "qsmall", "qodd"}),
        (["qbig>=3"], set()),
        (["qbig>=3", "qsmall"], {"qsmall", "qbig"}),  # for qsmall any will do
        (["qodd; sys_platform == 'win32'"], set()),
        (["qodd @ https://example.org/qodd.whl"], set()),
        (["qabsent"], set()),
        (["qbare", "qedit"], set()),
    ],
)
def test_what_fits_with_what_it_needs(parents: Path, needs: list[str], borrowed: set[str]) -> None:
    assert names(*needs) == borrowed


def test_links_lead_to_the_parents_files_in_site_packages_alone(parents: Path, tmp_path: Path) -> None:
    link_borrowed(find_borrowable([Requirement("qodd")]), tmp_path / "borrowed")
    links = {path.name: path.readlink() for path in (tmp_path / "borrowed").iterdir()}
    assert links == {name: parents / name for name in ("qodd", "qodd.libs", "qodd-0.1.dist-info")}


def test_several_may_share_a_folder(parents: Path, tmp_path: Path) -> None:
    for name in ("qodd", "qwin"):
        record = next(parents.glob(f"{name}-*.dist-info")) / "RECORD"
        record.write_text(record.read_text() + f"shared/{name}.py,,\n")
    link_borrowed(find_borrowable(map(Requirement, ["qodd", "qwin"])), tmp_path / "borrowed")
    assert (tmp_path / "borrowed/shared").readlink() == parents / "shared"


def test_torch_comes_with_its_needs_and_without_the_tests() -> None:
    found = names("torch>=2.6")
    assert {"torch", "sympy", "typing-extensions"} <= found
    assert "pytest" not in found
    assert "qbench" not in names("qbench")  # where it is installed for editing, as here
    assert sys.modules.keys() >= {"orchestrator.precisions.borrowing"}
