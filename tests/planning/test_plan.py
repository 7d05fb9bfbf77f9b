"""Options become cells: nothing is guessed silently, and invalid options are refused with a fix."""

import hashlib
import sys
from pathlib import Path

import pytest
from golden_text import Golden, without_names
from msgspec.structs import replace
from plans import MODEL, PRECISIONS, plan_of, refused
from sample_records import H100, T4

from orchestrator.errors import BadInput
from orchestrator.planning.plan import (
    CPU_BUDGET_S,
    Plan,
    choose_device,
    choose_interpreters,
    choose_precisions,
    find_obstacle,
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
    ("value", "gpus"),
    [
        pytest.param("cuda", [], id="no GPU"),
        pytest.param("cuda:0", [], id="no first GPU"),
        pytest.param("cuda:1", [H100], id="one GPU"),
        pytest.param("cuda:2", [H100, T4], id="two GPUs"),
        pytest.param("cuda:-1", [H100], id="negative"),
        pytest.param("cuda:x", [H100], id="not a number"),
        pytest.param("cuda:²", [H100], id="digit but not decimal"),
        pytest.param("gpu", [H100], id="other word"),
        pytest.param("CPU", [H100], id="upper case"),
        pytest.param("", [H100], id="empty"),
    ],
)
def test_an_unknown_device_is_refused(golden: Golden, value: str, gpus: list[Gpu]) -> None:
    with pytest.raises(BadInput) as caught:
        choose_device(value, gpus)
    assert (caught.value.option, caught.value.value) == ("--device", value)
    assert "cpu" in caught.value.fix
    golden(str(caught.value))


def test_the_job_has_everything_from_the_options(tmp_path: Path) -> None:
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


def test_a_checkpoint_is_only_for_its_precision() -> None:
    fp16, int8 = plan_of(precision=["fp16", "int8"], checkpoint={"int8": "x"}).cells
    assert (fp16.job.checkpoint, int8.job.checkpoint) == (None, "x")


def test_precisions_are_measured_once_in_the_order_given() -> None:
    cells = plan_of(precision=["int8", "fp16", "int8"]).cells
    assert [cell.precision.name for cell in cells] == ["int8", "fp16"]


def test_all_are_all() -> None:
    assert [each.name for each in choose_precisions(Options(all=True), PRECISIONS)] == list(PRECISIONS)


def test_nothing_to_measure_is_refused_with_the_choices(golden: Golden) -> None:
    error = refused(precision=[])
    assert (error.option, error.value) == ("--precision", "")
    assert "--all" in error.fix
    assert all(name in error.fix for name in PRECISIONS)
    golden(without_names(str(error)))


@pytest.mark.parametrize(("typed", "meant"), [("fp17", "fp16"), ("INT-8", "int8"), ("awk", "awq")])
def test_the_nearest_name_is_suggested(golden: Golden, typed: str, meant: str) -> None:
    error = refused(precision=["fp16", typed])
    assert (error.option, error.value) == ("--precision", typed)
    assert meant in error.fix.partition("?")[0]
    golden(without_names(str(error)))


def test_checkpoint_and_python_for_an_unknown_precision() -> None:
    checkpoint, python = refused(checkpoint={"fp17": "x"}), refused(python={"fp17": sys.executable})
    assert (checkpoint.option, checkpoint.value) == ("--checkpoint", "fp17")
    assert (python.option, python.value) == ("--python", "fp17")


def test_each_precision_has_its_interpreter() -> None:
    nowhere = Path("no/such/cache")
    assert all(interpreter.own for interpreter in choose_interpreters({}, PRECISIONS, nowhere).values())
    assert choose_interpreters({"awq": sys.executable}, PRECISIONS, nowhere)["awq"].own
    error = refused(python={"awq": "no/such/python"})
    assert (error.option, error.value) == ("--python", "no/such/python")


@pytest.mark.parametrize(
    ("gpus", "asked_s", "budget_s"),
    [([], None, CPU_BUDGET_S), ([], 12.5, 12.5), ([H100], None, None), ([H100], 60.0, 60.0)],
)
def test_budget(gpus: list[Gpu], asked_s: float | None, budget_s: float | None) -> None:
    assert plan_of(gpus, budget=asked_s).budget_s == budget_s


def test_precisions_that_cannot_run_are_in_the_plan_with_a_reason(golden: Golden) -> None:
    old = Gpu(
        index=0, uuid="GPU-0", name="K80", memory_bytes=1, compute_capability=(3, 7), memory_info_version=1
    )
    plan = plan_of([old], precision=["fp32", "int8"])
    assert [cell.precision.name for cell in plan.runnable] == ["fp32", "fp32"]
    assert list(plan.skipped) == ["int8"]
    golden(plan.skipped["int8"])
    assert len(plan.cells) == 3  # int8 is listed once, not once for each decode mode


def decode_modes(plan: Plan) -> list[str]:
    return [cell.job.workload.decode for cell in plan.cells]


def test_default_decode_modes() -> None:
    assert decode_modes(plan_of([H100])) == ["eager", "graph"]
    assert decode_modes(plan_of([])) == ["eager"]
    assert decode_modes(plan_of([H100], decode=["generate", "compile"])) == ["generate", "compile"]


def test_the_workloads_of_a_precision_are_adjacent() -> None:
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


def test_the_compute_capability_is_that_of_the_chosen_gpu() -> None:
    needs_9 = replace(PRECISIONS["fp16"], min_compute_capability=9.0)
    (interpreter,) = {cell.interpreter for cell in plan_of().cells}
    assert find_obstacle(needs_9, "cuda:0", [H100, T4], interpreter) is None
    assert "this one has 7.5" in str(find_obstacle(needs_9, "cuda:1", [H100, T4], interpreter))


def test_the_included_prompts_are_twenty_of_many_lengths() -> None:
    prompts = read_prompts(None)
    assert len(prompts) == len(set(prompts)) == 20
    assert prompts[0] == "What is the capital of France?"
    assert max(map(len, prompts)) > 10 * min(map(len, prompts))


def test_prompts_are_lines_without_blank_ones(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("  one \r\n\n\t\nzwei Grüße\n".encode())
    assert read_prompts(str(file)) == ["one", "zwei Grüße"]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(None, id="missing"),
        pytest.param(b"", id="empty"),
        pytest.param(b"\n  \n", id="blank"),
        pytest.param(b"\xff\xfe\x00", id="binary"),
    ],
)
def test_a_file_without_prompts(golden: Golden, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    error = refused(prompts=str(file))
    assert (error.option, error.value) == ("--prompts", str(file))
    golden(str(error).replace(str(tmp_path), "FOLDER"))


def test_a_folder_is_not_a_file_of_prompts(tmp_path: Path) -> None:
    error = refused(prompts=str(tmp_path))
    assert (error.option, error.value) == ("--prompts", str(tmp_path))


def test_no_model_is_downloaded_if_nothing_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_model() -> ModelSource:
        raise AssertionError("the model was looked for")

    monkeypatch.setattr("orchestrator.planning.plan.find_obstacle", lambda *_: "needs torch")
    with pytest.raises(BadInput, match="fp32 needs torch") as caught:
        make_plan(Options(all=True), PRECISIONS, find_model, [], Path("cache"))
    assert caught.value.option == "--all"


def test_only_calibrated_jobs_hold_the_calibration_text(tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("words")
    other = replace(PRECISIONS["awq"], name="awq-2")
    options = Options(
        precision=["fp16", "awq", "awq-2"], calibration=str(text), checkpoint={"awq-2": "ready"}
    )
    plan = make_plan(options, PRECISIONS | {"awq-2": other}, lambda: MODEL, [], Path("cache"))
    texts = {cell.job.precision: cell.job.calibration for cell in plan.cells}
    assert texts["fp16"] is None
    assert texts["awq-2"] is None  # what its checkpoint was calibrated with is unknown
    assert texts["awq"] == CalibrationText(
        path=str(text), sha256=hashlib.sha256(text.read_bytes()).hexdigest()
    )
