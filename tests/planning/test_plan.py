"""From options to cells: nothing is guessed silently, and what can't be meant is refused with a fix."""

import hashlib
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace
from plans import MODEL, PRECISIONS, bad_input, plan_of
from sample_records import H100, T4

from orchestrator.errors import BadInput
from orchestrator.planning.plan import (
    CPU_BUDGET_S,
    Plan,
    check,
    choose_device,
    choose_interpreters,
    choose_precisions,
    make_plan,
    read_prompts,
)
from orchestrator.records.keys import key_of
from schemas.environment import Gpu
from schemas.job import CalibrationText, ModelSource
from schemas.options import Options


@pytest.mark.parametrize(
    ("value", "gpus", "device"),
    [
        ("auto", [], "cpu"),
        ("auto", [H100, T4], "cuda:0"),
        ("cpu", [H100], "cpu"),
        ("cuda", [H100], "cuda:0"),
        ("cuda:1", [H100, T4], "cuda:1"),
    ],
)
def test_device(value: str, gpus: list[Gpu], device: str) -> None:
    assert choose_device(value, gpus) == device
    assert {cell.job.device for cell in plan_of(gpus, device=value).cells} == {device}


@pytest.mark.parametrize(
    ("value", "gpus", "problem"),
    [
        ("cuda", [], "no NVIDIA GPU here"),
        ("cuda:0", [], "no NVIDIA GPU here"),
        ("cuda:2", [H100, T4], "only 2 GPUs here"),
        ("cuda:-1", [H100], "is no device"),
        ("cuda:x", [H100], "is no device"),
        ("gpu", [H100], "is no device"),
        ("CPU", [H100], "is no device"),
        ("", [H100], "is no device"),
    ],
)
def test_no_such_device(value: str, gpus: list[Gpu], problem: str) -> None:
    with pytest.raises(BadInput, match=problem) as caught:
        choose_device(value, gpus)
    assert caught.value.option == "--device"
    assert "cpu" in caught.value.fix


def test_a_digit_that_is_no_number_is_no_device() -> None:
    with pytest.raises(BadInput, match="is no device"):
        choose_device("cuda:²", [H100])


def test_the_job_says_all_that_the_options_said(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    (cell,) = plan_of(
        precision=["int8"],
        prompts=str(tmp_path / "prompts.txt"),
        prompt_tokens=[32],
        depth=[9],
        decode=["compile"],
        new_tokens=7,
        batch_size=2,
        warmup=0,
        seed=3,
        checkpoint={"int8": "some/folder"},
    ).cells
    job = cell.job
    assert (job.precision, job.model, job.checkpoint, job.seed) == ("int8", MODEL, "some/folder", 3)
    assert job.workload.prompts == ["one", "two"]
    load = job.workload
    assert (load.prompt_tokens, load.depth, load.decode) == (32, 9, "compile")
    assert (load.new_tokens, load.batch_size, load.warmup) == (7, 2, 0)
    assert {"torch", "bitsandbytes"} <= set(job.packages)
    assert job.cache_folder == "cache"


def test_a_checkpoint_is_for_its_own_precision_alone() -> None:
    fp16, int8 = plan_of(precision=["fp16", "int8"], checkpoint={"int8": "x"}).cells
    assert (fp16.job.checkpoint, int8.job.checkpoint) == (None, "x")


def test_precisions_come_in_the_order_given_and_once() -> None:
    cells = plan_of(precision=["int8", "fp16", "int8"]).cells
    assert [cell.precision.name for cell in cells] == ["int8", "fp16"]


def test_all_are_all() -> None:
    assert [each.name for each in choose_precisions(Options(all=True), PRECISIONS)] == list(PRECISIONS)


def test_nothing_to_measure_is_refused_with_the_choice() -> None:
    line = bad_input(precision=[])
    assert "--all" in line
    assert all(name in line for name in PRECISIONS)


@pytest.mark.parametrize(("typed", "meant"), [("fp17", "fp16"), ("INT-8", "int8"), ("awk", "awq")])
def test_an_unknown_name_gets_the_nearest(typed: str, meant: str) -> None:
    line = bad_input(precision=["fp16", typed])
    assert f"--precision {typed}" in line
    assert f"Did you mean {meant}?" in line


def test_checkpoint_and_python_for_an_unknown_precision() -> None:
    assert bad_input(checkpoint={"fp17": "x"}).startswith("--checkpoint fp17: there is no such precision")
    assert bad_input(python={"fp17": sys.executable}).startswith("--python fp17: there is no such precision")


def test_each_precision_has_its_interpreter() -> None:
    nowhere = Path("no/such/cache")
    assert all(interpreter.own for interpreter in choose_interpreters({}, PRECISIONS, nowhere).values())
    assert choose_interpreters({"awq": sys.executable}, PRECISIONS, nowhere)["awq"].own
    assert "is not an executable program" in bad_input(python={"awq": "no/such/python"})


@pytest.mark.parametrize(
    ("gpus", "asked_s", "budget_s"),
    [([], None, CPU_BUDGET_S), ([], 12.5, 12.5), ([H100], None, None), ([H100], 60.0, 60.0)],
)
def test_budget(gpus: list[Gpu], asked_s: float | None, budget_s: float | None) -> None:
    assert plan_of(gpus, budget=asked_s).budget_s == budget_s


def test_what_cannot_run_stays_in_the_plan_with_its_reason() -> None:
    old = Gpu(
        index=0, uuid="GPU-0", name="K80", memory_bytes=1, compute_capability=(3, 7), memory_info_version=1
    )
    plan = plan_of([old], precision=["fp32", "int8"])
    assert [cell.precision.name for cell in plan.runnable] == ["fp32", "fp32"]
    assert plan.left_out == {"int8": "needs a GPU of compute capability 7.5; this one has 3.7"}
    assert len(plan.cells) == 3  # what can't run is told once, not once for each decode mode


def decode_modes(plan: Plan) -> list[str]:
    return [cell.job.workload.decode for cell in plan.cells]


def test_a_gpu_is_measured_with_and_without_a_graph_a_cpu_without() -> None:
    assert decode_modes(plan_of([H100])) == ["eager", "graph"]
    assert decode_modes(plan_of([])) == ["eager"]
    assert decode_modes(plan_of([H100], decode=["generate", "compile"])) == ["generate", "compile"]


def test_every_workload_of_a_precision_follows_the_other() -> None:
    cells = plan_of(
        precision=["fp16", "bf16"],
        batch_size=[1, 4],
        prompt_tokens=[8, 16],
        depth=[0, 5],
        new_tokens=[2, 128],
        decode=["eager"],
    ).cells
    assert [cell.precision.name for cell in cells] == ["fp16"] * 16 + ["bf16"] * 16
    loads = [cell.job.workload for cell in cells[:5]]
    shapes = [(load.batch_size, load.prompt_tokens, load.depth, load.new_tokens) for load in loads]
    assert shapes == [(1, 8, 0, 2), (1, 8, 0, 128), (1, 8, 5, 2), (1, 8, 5, 128), (1, 16, 0, 2)]
    assert len({key_of(cell.job).stem for cell in cells}) == 32


def test_the_compute_capability_is_that_of_the_gpu_asked_for() -> None:
    needs_9 = replace(PRECISIONS["fp16"], min_compute_capability=9.0)
    (interpreter,) = {cell.interpreter for cell in plan_of().cells}
    assert check(needs_9, "cuda:0", [H100, T4], interpreter) is None
    assert "this one has 7.5" in str(check(needs_9, "cuda:1", [H100, T4], interpreter))


def test_our_own_prompts_are_twenty_of_many_lengths() -> None:
    prompts = read_prompts(None)
    assert len(prompts) == len(set(prompts)) == 20
    assert prompts[0] == "What is the capital of France?"
    assert max(map(len, prompts)) > 10 * min(map(len, prompts))


def test_a_prompt_a_line_blank_lines_apart(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("  one \r\n\n\t\nzwei Grüße\n".encode())
    assert read_prompts(str(file)) == ["one", "zwei Grüße"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "can't be read"),
        (b"", "holds no prompt"),
        (b"\n  \n", "holds no prompt"),
        (b"\xff\xfe\x00", "can't be read"),
    ],
)
def test_a_file_that_gives_no_prompt(tmp_path: Path, content: bytes | None, problem: str) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    line = bad_input(prompts=str(file))
    assert line.startswith(f"--prompts {file}: {problem}")
    assert "one prompt a line" in line


def test_a_folder_is_no_file_of_prompts(tmp_path: Path) -> None:
    assert "can't be read" in bad_input(prompts=str(tmp_path))


def test_where_nothing_can_run_no_model_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_model() -> ModelSource:
        raise AssertionError("the model was looked for")

    monkeypatch.setattr("orchestrator.planning.plan.check", lambda *_: "needs torch")
    with pytest.raises(BadInput, match=r"--all: nothing can run here: fp32 needs torch"):
        make_plan(Options(all=True), PRECISIONS, find_model, [], Path("cache"))


def test_only_jobs_whose_weights_are_calibrated_carry_the_text(tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("words")
    twin = replace(PRECISIONS["awq"], name="awq-twin")
    options = Options(
        precision=["fp16", "awq", "awq-twin"], calibration=str(text), checkpoint={"awq-twin": "ready"}
    )
    plan = make_plan(options, PRECISIONS | {"awq-twin": twin}, lambda: MODEL, [], Path("cache"))
    carried = {cell.job.precision: cell.job.calibration for cell in plan.cells}
    assert carried["fp16"] is None
    assert carried["awq-twin"] is None  # its checkpoint was calibrated with who knows what
    assert carried["awq"] == CalibrationText(
        path=str(text), sha256=hashlib.sha256(text.read_bytes()).hexdigest()
    )
