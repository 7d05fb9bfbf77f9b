"""Plan files: what they say becomes options, what was typed wins, and what is wrong is told with its line."""

import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, Qbench
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


def test_a_sweep_can_be_for_some_precisions_alone(tmp_path: Path) -> None:
    def depths(options: Options) -> list[tuple[str, int]]:
        cells = plan_of(precision=options.precision, workloads=options.workloads).cells
        return [(cell.precision.name, cell.job.workload.depth) for cell in cells]

    planned = options_of(FOR_SOME, tmp_path)
    assert depths(planned) == [("fp32", 1), ("bf16", 1), ("bf16", 2), ("bf16", 3)]
    assert depths(overlay(planned, Options(precision=["fp32"]), {"precision"})) == [("fp32", 1)]
    only = replace(planned, workloads=planned.workloads[1:])
    for idle in (only, overlay(only, Options(precision=["fp32"]), {"precision"})):
        with pytest.raises(BadInput, match=r"--precision fp32: no .* is for it"):
            depths(idle)


def test_the_example_in_the_documents(tmp_path: Path) -> None:
    example = (ROOT / "docs/sweeps.md").read_text().partition("```toml\n")[2].partition("```")[0]
    sweeps = options_of(example, tmp_path).workloads
    assert [(sweep.batch_size, sweep.prompt_tokens) for sweep in sweeps] == [([1, 2, 4], [32]), (None, [512])]


def test_what_was_typed_wins_in_every_sweep_too() -> None:
    planned = Options(
        all=True, rounds=3, batch_size=[4], workloads=[Sweep(batch_size=[8], depth=[5]), Sweep(depth=[6])]
    )
    given = Options(precision=["fp16"], batch_size=[2], rounds=9)
    assert overlay(planned, given, {"precision", "batch_size"}) == Options(
        precision=["fp16"], rounds=3, batch_size=[2], workloads=[Sweep(depth=[5]), Sweep(depth=[6])]
    )
    assert overlay(planned, given, ()) == planned


def test_each_sweep_is_a_product_of_its_own_and_no_workload_comes_twice() -> None:
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
    "an underscore": ("all = true\nbatch_size = 1\n", 2, "batch_size: ", "Did you mean batch-size?"),
    "no such key": ("# mine\n\nall = true\nspeed = 1\n", 4, "speed: there is no such key", "There are all, "),
    "key of a sweep": ("[[workloads]]\ndepth = 1\n[[workloads]]\nall = true\n", 4, "all: ", "There are "),
    "count": ("batch-size = [\n  1,\n  0,\n]\n", 1, "batch-size [1,0]: ", "Expected int >= 1"),
    "range": ("rounds = 2\nnew-tokens = '9-1'\n", 2, "new-tokens 9-1: is no range", "never reaches 1"),
    "range of a sweep": ("[[workloads]]\ndepth = '?'\n", 2, "depth ?: is no range", "Write a number"),
    "share": ("precise = 'much'\n", 1, "precise much: ", "Write 1% or 0.01"),
    "text for a number": ("rounds = '7'\n", 1, 'rounds "7": ', "Expected int, got str"),
    "truth for a number": ("batch-size = true\n", 1, "batch-size true: ", "Expected int, got bool"),
    "number for a text": ("\nmodel = 7\n", 2, "model 7: ", "Expected str, got int"),
    "mode": ("decode = ['fast']\n", 1, 'decode ["fast"]: ', "take some of eager, graph"),
    "entry of a table": ("all = true\n[python]\nawq = 5\n", 2, 'python {"awq":5}: ', "Expected str"),
    "one table for several": ("[workloads]\ndepth = 1\n", 1, "workloads ", "Expected array"),
    "numbers for tables": ("workloads = [1]\n", 1, "workloads [1]: ", "Expected object, got int"),
    "no TOML": ("all = true\nrounds = \n", 2, "is not TOML", "Invalid value"),
    "no end": ("all = true\nprecision = [\n", 2, "is not TOML", ""),
    "twice": ("all = true\n\nall = false", 3, "is not TOML", "Cannot overwrite a value"),
    # What is found out later, when the plan is made
    "no such precision": ("rounds = 2\nprecision = 'fp17'\n", 2, "precision fp17: ", "Did you mean fp16?"),
    "a sweep of no such precision": (
        "precision = 'fp16'\n[[workloads]]\n[[workloads]]\nprecision = 'fp17'\n",
        4, "precision fp17: there is no such precision", "Did you mean fp16?",
    ),
    "a sweep of what isn't measured": (
        "precision = 'fp16'\n[[workloads]]\nprecision = 'int8'\n",
        3, "precision int8: is not measured", "-p int8",
    ),
    "no sweep": (
        "precision = 'fp16,fp32'\n[[workloads]]\nprecision = 'fp16'\n",
        1, "precision fp32: no [[workloads]] is for it", "Add one",
    ),
    "no such file": ("all = true\nprompts = 'absent.txt'\n", 2, "prompts absent.txt: can't be read", "Name"),
    "no such device": ("all = true\ndevice = 'toaster'\n", 2, "device toaster: is no device", "Take cpu"),
}  # fmt: skip


def assert_one_line(done: "subprocess.CompletedProcess[str]", *said: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert all(each in line for each in said), line


@pytest.mark.parametrize(("text", "line", "named", "fix"), BAD.values(), ids=BAD)
def test_what_cant_be_meant(
    qbench: Qbench, tmp_path: Path, text: str, line: int, named: str, fix: str
) -> None:
    (tmp_path / "sweep.toml").write_text(text)
    done = qbench("orchestrate", "--plan", "sweep.toml", "--dry-run")
    assert_one_line(done, f"error: --plan sweep.toml, line {line}: {named}", fix)


def test_what_was_typed_is_not_blamed_on_the_file(qbench: Qbench, tmp_path: Path) -> None:
    (tmp_path / "sweep.toml").write_text("precision = 'fp16'\n")
    done = qbench("orchestrate", "--plan", "sweep.toml", "-p", "fp17")
    assert_one_line(done, "error: --precision fp17: there is no such precision")
    assert_one_line(qbench("orchestrate", "--plan", "absent.toml"), "--plan absent.toml: can't be read")


def test_a_file_that_cant_be_decoded(tmp_path: Path) -> None:
    (tmp_path / "sweep.toml").write_bytes(b"model = '\xff'\n")
    with pytest.raises(BadInput, match="can't be read"):
        PlanFile(str(tmp_path / "sweep.toml"))


def test_a_plan_file_and_what_is_typed_beside_it(qbench: Qbench, tmp_path: Path) -> None:
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
