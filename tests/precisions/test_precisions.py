"""Precisions are read from the headers in a folder, and every error in a header is reported with its file."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from golden_text import Golden

from orchestrator.errors import BadInput
from orchestrator.precisions.catalog import BadHeader, choose, find_precisions

WORKER = '''\
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "bitsandbytes>=0.49"]
# [tool.qbench]
# precision = "int8"
# label = "INT8 (LLM.int8)"
# bits_per_weight = 8
# devices = ["cpu", "cuda"]
# min_compute_capability = 7.5
# ///
"""LLM.int8: eight bits, outliers kept in FP16.

More of it.
"""

raise ImportError("a header is read, never run")
'''


def write(folder: Path, name: str, **changes: str) -> Path:
    """Write WORKER as `folder/workers/NAME`, each key of `changes` replaced by its value."""
    text = WORKER
    for old, new in changes.items():
        text = text.replace(old, new)
    path = folder / "workers" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_a_header_is_read_without_an_import(tmp_path: Path) -> None:
    path = write(tmp_path, "int8_bnb.py")
    int8 = find_precisions(tmp_path / "workers")["int8"]
    assert int8.module == "workers.int8_bnb"
    assert int8.path == path
    assert int8.label == "INT8 (LLM.int8)"
    assert int8.bits_per_weight == 8.0
    assert int8.devices == ["cpu", "cuda"]
    assert int8.min_compute_capability == 7.5
    assert int8.requirements == ["torch>=2.6", "bitsandbytes>=0.49"]
    assert int8.requires_python == ">=3.11"
    assert int8.summary == "LLM.int8: eight bits, outliers kept in FP16."


def test_most_bits_come_first_then_names(tmp_path: Path) -> None:
    write(tmp_path, "a.py", **{'"int8"': '"awq"', "weight = 8": "weight = 4.25"})
    write(tmp_path, "b.py")
    write(tmp_path, "c.py", **{'"int8"': '"fp8"'})
    write(tmp_path, "d.py", **{'"int8"': '"fp16"', "weight = 8": "weight = 16"})
    assert list(find_precisions(tmp_path / "workers")) == ["fp16", "fp8", "int8", "awq"]


def test_files_that_are_not_workers_are_left_out(tmp_path: Path) -> None:
    folder = write(tmp_path, "int8_bnb.py").parent
    (folder / "__init__.py").write_text("")
    (folder / "protocol.py").write_text('"""Shared by all workers."""\nimport torch\n')
    (folder / "script.py").write_text('# /// script\n# dependencies = ["rich"]\n# ///\nprint()\n')
    assert list(find_precisions(folder)) == ["int8"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("bits_per_weight = 8", 'bits_per_weight = "8"'),
        ('"cuda"]', '"tpu"]'),
        ('# label = "INT8 (LLM.int8)"\n', ""),
        ("min_compute_capability", "min_capability"),
        ('"int8"', "int8"),
        ("# ///\n", ""),
        ("# label", "label"),
        ('"""LLM', '\n# /// script\n# x = 1\n# ///\n"""LLM'),
        ("raise ImportError(", "raise ImportError(("),
        ('"""LLM', 'pass\n"""LLM'),
    ],
    ids=[
        *("wrong type", "unknown device", "missing field", "unknown field", "not TOML"),
        *("not closed", "not a comment", "two blocks", "not Python", "no docstring"),
    ],
)
def test_a_broken_header_is_reported_with_its_file(
    tmp_path: Path, old: str, new: str, golden: Golden
) -> None:
    path = write(tmp_path, "broken.py", **{old: new})
    with pytest.raises(BadHeader) as caught:
        find_precisions(path.parent)
    assert str(caught.value).startswith(f"{path}: ")
    problem = str(caught.value).removeprefix(f"{path}: ")
    golden(
        re.sub(r"(is not (Python|TOML)): .*", r"\1: …", problem)
    )  # Python's wording depends on the version


def test_two_workers_cannot_share_a_name(tmp_path: Path, golden: Golden) -> None:
    write(tmp_path, "one.py")
    path = write(tmp_path, "two.py")
    with pytest.raises(BadHeader) as caught:
        find_precisions(path.parent)
    golden(str(caught.value).replace(str(path.parent), "FOLDER"))


def test_choose_keeps_the_order_asked_for_and_drops_repeats(tmp_path: Path) -> None:
    write(tmp_path, "a.py")
    write(tmp_path, "b.py", **{'"int8"': '"fp8"'})
    precisions = find_precisions(tmp_path / "workers")
    assert [each.name for each in choose(precisions, ["int8", "fp8", "int8"])] == ["int8", "fp8"]


@pytest.mark.parametrize("name", ["INT-8", "gguf"])
def test_for_an_unknown_name_the_nearest_is_suggested(tmp_path: Path, name: str, golden: Golden) -> None:
    precisions = find_precisions(write(tmp_path, "a.py").parent)
    with pytest.raises(BadInput) as caught:
        choose(precisions, [name], option="--python")
    assert (caught.value.option, caught.value.value) == ("--python", name)
    golden(caught.value.fix)


def test_our_own_workers_are_found_and_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from orchestrator.precisions.catalog import find_precisions; print(*find_precisions());"
        "assert not {'torch', 'transformers', 'workers', 'click', 'rich'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"fp16", "int8", "awq"} <= set(done.stdout.split())
