"""Plan files: their values become options, the command line overrides them, and errors cite the line."""

import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, Qbench
from golden_text import Golden, without_names
from msgspec.structs import replace
from plans import plan_of

from orchestrator.cli.plan_file import PlanFile, line_of, overlay
from orchestrator.errors import BadInput
from schemas.options import Options, Sweep

FULL = """\
precision = ["fp16", "int8"]      # as -p fp16,int8
model = "random:qwen2.5-0.5b"
batch-size = "1-8*2"
prompt-tokens = [
  32,
  64,
]
new-tokens = 4
decode = "eager,graph"
budget = 300
precise = "1%"

[python]
int8 = "/usr/bin/python3"

[[workloads]]
depth = "0,16"

[[workloads]]
batch-size = 1
decode = ["compile"]
"""


def options_of(text: str, tmp_path: Path) -> Options:
    (tmp_path / "sweep.toml").write_text(text)
    return PlanFile(str(tmp_path / "sweep.toml")).options()


def test_every_kind_of_value(tmp_path: Path) -> None:
    assert options_of(FULL, tmp_path) == Options(
        precision=["fp16", "int8"],
        model="random:qwen2.5-0.5b",
        batch_size=[1, 2, 4, 8],
        prompt_tokens=[32, 64],
        new_tokens=[4],
        decode=["eager", "graph"],
        budget=300.0,
        precise=0.01,
        python={"int8": "/usr/bin/python3"},
        workloads=[Sweep(depth=[0, 16]), Sweep(batch_size=[1], decode=["compile"])],
    )


FOR_SOME = """\
precision = "fp32,bf16"

[[workloads]]
depth = 1

[[workloads]]
precision = "bf16"
depth = "2,3"
"""


def test_a_sweep_can_be_for_some_precisions_only(golden: Golden, tmp_path: Path) -> None:
    def depths(options: Options) -> list[tuple[str, int]]:
        cells = plan_of(precision=options.precision, workloads=options.workloads).cells
        return [(cell.precision.name, cell.job.workload.depth) for cell in cells]

    planned = options_of(FOR_SOME, tmp_path)
    assert depths(planned) == [("fp32", 1), ("bf16", 1), ("bf16", 2), ("bf16", 3)]
    assert depths(overlay(planned, Options(precision=["fp32"]), {"precision"})) == [("fp32", 1)]
    only = replace(planned, workloads=planned.workloads[1:])
    for idle in (only, overlay(only, Options(precision=["fp32"]), {"precision"})):
        with pytest.raises(BadInput) as caught:
            depths(idle)
        assert (caught.value.option, caught.value.value) == ("--precision", "fp32")
        golden(str(caught.value))


def test_the_example_in_the_documents(tmp_path: Path) -> None:
    example = (ROOT / "docs/sweeps.md").read_text().partition("```toml\n")[2].partition("```")[0]
    sweeps = options_of(example, tmp_path).workloads
    assert [(sweep.batch_size, sweep.prompt_tokens) for sweep in sweeps] == [([1, 2, 4], [32]), (None, [512])]


def test_the_command_line_overrides_every_sweep() -> None:
    planned = Options(
        all=True, rounds=3, batch_size=[4], workloads=[Sweep(batch_size=[8], depth=[5]), Sweep(depth=[6])]
    )
    given = Options(precision=["fp16"], batch_size=[2], rounds=9)
    assert overlay(planned, given, {"precision", "batch_size"}) == Options(
        precision=["fp16"], rounds=3, batch_size=[2], workloads=[Sweep(depth=[5]), Sweep(depth=[6])]
    )
    assert overlay(planned, given, ()) == planned


def test_each_sweep_is_a_separate_product_without_duplicate_workloads() -> None:
    sweeps = [Sweep(batch_size=[1, 8], prompt_tokens=[128]), Sweep(prompt_tokens=[8192, 128])]
    cells = plan_of(workloads=sweeps, decode=["eager"], new_tokens=[3]).cells
    loads = [cell.job.workload for cell in cells]
    assert [(load.batch_size, load.prompt_tokens) for load in loads] == [(1, 128), (8, 128), (1, 8192)]
    assert {load.new_tokens for load in loads} == {3}


@pytest.mark.parametrize(
    ("place", "line"),
    [
        (("precision",), 1),
        (("prompt-tokens",), 4),
        (("new-tokens",), 8),
        (("python",), 13),
        (("python", "int8"), 14),
        (("workloads", 0, "depth"), 17),
        (("workloads", 1), 19),
        (("workloads", 1, "decode"), 21),
    ],
)
def test_lines(place: tuple[str | int, ...], line: int) -> None:
    assert line_of(place, FULL) == line


BAD = {
    "an underscore": ("all = true\nbatch_size = 1\n", 2, "batch_size: "),
    "unknown key": ("# mine\n\nall = true\nspeed = 1\n", 4, "speed: "),
    "unknown key of a sweep": ("[[workloads]]\ndepth = 1\n[[workloads]]\nall = true\n", 4, "all: "),
    "count": ("batch-size = [\n  1,\n  0,\n]\n", 1, "batch-size [1,0]: "),
    "range": ("rounds = 2\nnew-tokens = '9-1'\n", 2, "new-tokens 9-1: "),
    "range of a sweep": ("[[workloads]]\ndepth = '?'\n", 2, "depth ?: "),
    "percentage": ("precise = 'much'\n", 1, "precise much: "),
    "text for a number": ("rounds = '7'\n", 1, 'rounds "7": '),
    "boolean for a number": ("batch-size = true\n", 1, "batch-size true: "),
    "number for a text": ("\nmodel = 7\n", 2, "model 7: "),
    "mode": ("decode = ['fast']\n", 1, 'decode ["fast"]: '),
    "entry of a table": ("all = true\n[python]\nawq = 5\n", 2, 'python {"awq":5}: '),
    "table for an array": ("[workloads]\ndepth = 1\n", 1, "workloads "),
    "numbers for tables": ("workloads = [1]\n", 1, "workloads [1]: "),
    "not TOML": ("all = true\nrounds = \n", 2, "is not TOML"),
    "unclosed": ("all = true\nprecision = [\n", 2, "is not TOML"),
    "duplicate": ("all = true\n\nall = false", 3, "is not TOML"),
    # Errors found later, when the plan is made
    "unknown precision": ("rounds = 2\nprecision = 'fp17'\n", 2, "precision fp17: "),
    "unknown precision of a sweep": (
        "precision = 'fp16'\n[[workloads]]\n[[workloads]]\nprecision = 'fp17'\n", 4, "precision fp17: ",
    ),
    "sweep of a precision not measured": (
        "precision = 'fp16'\n[[workloads]]\nprecision = 'int8'\n", 3, "precision int8: ",
    ),
    "no sweep": ("precision = 'fp16,fp32'\n[[workloads]]\nprecision = 'fp16'\n", 1, "precision fp32: "),
    "missing file": ("all = true\nprompts = 'absent.txt'\n", 2, "prompts absent.txt: "),
    "unknown device": ("all = true\ndevice = 'toaster'\n", 2, "device toaster: "),
}  # fmt: skip


def error_line(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize(("text", "line", "named"), BAD.values(), ids=BAD)
def test_errors_cite_the_line(
    golden: Golden, qbench: Qbench, tmp_path: Path, text: str, line: int, named: str
) -> None:
    (tmp_path / "sweep.toml").write_text(text)
    error = error_line(qbench("orchestrate", "--plan", "sweep.toml", "--dry-run"))
    assert error.startswith(f"error: --plan sweep.toml, line {line}: {named}")
    golden(without_names(error))


def test_errors_of_the_command_line_do_not_cite_the_file(qbench: Qbench, tmp_path: Path) -> None:
    (tmp_path / "sweep.toml").write_text("precision = 'fp16'\n")
    error = error_line(qbench("orchestrate", "--plan", "sweep.toml", "-p", "fp17"))
    assert error.startswith("error: --precision fp17: ")


def test_a_missing_file(golden: Golden, qbench: Qbench) -> None:
    error = error_line(qbench("orchestrate", "--plan", "absent.toml"))
    assert error.startswith("error: --plan absent.toml: ")
    golden(error)


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = str(tmp_path / "sweep.toml")
    (tmp_path / "sweep.toml").write_bytes(b"model = '\xff'\n")
    with pytest.raises(BadInput) as caught:
        PlanFile(path)
    assert (caught.value.option, caught.value.value) == ("--plan", path)


def test_a_plan_file_combined_with_the_command_line(qbench: Qbench, tmp_path: Path) -> None:
    (tmp_path / "sweep.toml").write_text(
        "all = true\nmodel = 'random:qwen2.5-0.5b'\nnew-tokens = [2, 4]\nbatch-size = '1-4*2'\n"
    )
    options = ["-p", "int8,fp16", "-p", "fp32", "--batch-size", "1", "--device", "cpu", "--dry-run"]
    done = qbench("orchestrate", "--plan", "sweep.toml", *options)
    assert done.returncode == 0, done.stderr
    cells = [line.split(" under ")[0].split(", 20 prompts × ") for line in done.stdout.splitlines()]
    assert [(cell[0].split(":")[0], cell[1]) for cell in cells if len(cell) == 2] == [
        (name, f"{count} new tokens, batch 1,") for name in ("int8", "fp16", "fp32") for count in (2, 4)
    ]
