"""Decode modes: the same tokens from each, several cells from one worker, and refusals in words.

The model is small but lively: what it says depends on all that it was told, so that a wrong position, mask
or cache shows in the tokens.
"""

import importlib
from pathlib import Path

import msgspec
import pytest
import torch
from small_models import small_model
from transformers import PreTrainedModel
from worker_runs import make_job, run_jobs

from orchestrator.precisions.catalog import find_precisions
from schemas.frames import Done, Failed, Loaded, Phase, SetUp, Trial, WarmedUp
from schemas.job import Job
from workers.generation import compile_mode, device
from workers.generation.compilation import Compile
from workers.generation.device import Device
from workers.generation.modes import set_up_generation
from workers.generation.prompts import Batch, make_batches
from workers.generation.static_cache import StepState, grouped_attention_in
from workers.generation.steppers import EagerStepper, StaticStepper
from workers.generation.timed_generation import Limits, generate_stepwise
from workers.harness import profiling, warmup
from workers.kernels.int_mm import int_mm, scaled_int_mm
from workers.protocol.backend import LoadedModel
from workers.protocol.errors import Unsupported

UNEQUAL = ["Name a river.", "Why is the sky blue, and not green, when the sun is high?", "Go"]
MODES = ("eager", "generate", "compile")
LAYER_TYPES = ["full_attention", "sliding_attention"]


def tokens(job: Job, **environment: str) -> dict[str, list[list[int]]]:
    """What each mode that a CPU has answers to the job's prompts, from one worker."""
    jobs = [with_workload(job, decode=mode) for mode in MODES]
    runs = run_jobs(jobs, **environment)
    assert all(run.all(Done) for run in runs), [run.all(Failed) for run in runs]
    return {
        mode: [trial.token_ids for trial in run.all(Trial)] for mode, run in zip(MODES, runs, strict=True)
    }


def with_workload(job: Job, **fields: object) -> Job:
    return msgspec.structs.replace(job, workload=msgspec.structs.replace(job.workload, **fields))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3])
def test_all_modes_give_the_same_tokens(batch_size: int, lively: Path, cache: Path) -> None:
    job = make_job("fp32", lively, cache, prompts=UNEQUAL, batch_size=batch_size)
    said = tokens(job)
    assert said["compile"] == said["eager"] == said["generate"]
    assert len(said["eager"]) == 3 // batch_size
    assert min(len(set(answer)) for answer in said["eager"]) > 3  # else this model could prove nothing


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["nf4", "fp4", "int8-wo", "int8-dyn", "fp8-wo"])
def test_quantized_formats_part_at_ties_alone(precision: str, lively: Path, cache: Path) -> None:
    job = make_job(precision, lively, cache, prompts=UNEQUAL)
    said = tokens(job)
    assert said["generate"] == said["eager"]
    loaded = importlib.import_module(find_precisions()[precision].module).load(job)
    batches = make_batches(job, loaded.tokenizer, loaded.model.config.vocab_size)
    for batch, eager, compiled in zip(batches, said["eager"], said["compile"], strict=True):
        assert len(set(eager)) > 3  # else this model could prove nothing
        assert loss_where_they_part(loaded.model, batch, eager, compiled) < 0.1


@torch.inference_mode()
def loss_where_they_part(model: PreTrainedModel, batch: Batch, chosen: list[int], other: list[int]) -> float:
    """By how much `chosen` has the higher logit at the first token that differs, in their deviations."""
    steps = [step for step, pair in enumerate(zip(chosen, other, strict=True)) if len(set(pair)) > 1]
    if not steps:
        return 0.0
    context = torch.cat([batch.ids, torch.tensor([chosen[: steps[0]]], dtype=torch.long)], dim=1)
    logits = model(context).logits[0, -1].float()
    return float((logits[chosen[steps[0]]] - logits[other[steps[0]]]) / logits.std())


@pytest.mark.slow
def test_context_before_the_prompt_is_as_good_as_in_it(lively: Path, cache: Path) -> None:
    jobs = [
        make_job("fp32", lively, cache, prompts=UNEQUAL, depth=21, batch_size=3, decode=mode)
        for mode in ("eager", "compile")
    ]
    shallow = make_job("fp32", lively, cache, prompts=UNEQUAL, batch_size=3)
    eager, compiled, without = (run.one(Trial).token_ids for run in run_jobs([*jobs, shallow]))
    assert eager == compiled
    assert eager != without

    from transformers import AutoModelForCausalLM, AutoTokenizer

    (batch,) = make_batches(
        with_workload(jobs[0], prompts=UNEQUAL[1:2], batch_size=1), AutoTokenizer.from_pretrained(lively), 512
    )
    assert batch.context is not None
    whole = torch.cat([batch.context, batch.ids], dim=1)
    model = AutoModelForCausalLM.from_pretrained(lively, dtype=torch.float32)
    made = model.generate(whole, do_sample=False, min_new_tokens=12, max_new_tokens=12, eos_token_id=None)
    alone = with_workload(jobs[0], prompts=UNEQUAL[1:2], batch_size=1)
    assert run_jobs([alone])[0].one(Trial).token_ids == made[0, whole.shape[1] :].tolist()


@pytest.mark.slow
def test_a_worker_loads_once_and_outlives_a_refusal(lively: Path, cache: Path) -> None:
    job = make_job("fp32", lively, cache)
    first, refused, again = run_jobs([job, with_workload(job, decode="graph"), job])
    assert len(first.all(Loaded)) == 1
    assert not again.all(Loaded)
    failed = refused.one(Failed)
    assert failed.kind == "unsupported"
    assert failed.message == "CUDA graphs need an NVIDIA GPU"
    assert "eager" in (failed.hint or "")
    assert [trial.token_ids for trial in again.all(Trial)] == [trial.token_ids for trial in first.all(Trial)]
    assert [phase.name for phase in again.all(Phase)][:2] == ["setup", "warmup"]


@pytest.mark.slow
def test_compilation_is_timed_apart(lively: Path, cache: Path) -> None:
    (run,) = run_jobs([make_job("fp32", lively, cache, decode="compile")])
    setup = run.one(SetUp)
    assert setup.compile_s is not None
    assert 0.5 < setup.compile_s <= setup.setup_s
    assert setup.graph_breaks == 0
    assert setup.cache_tokens is not None
    assert setup.cache_tokens % 16 == 0
    assert max(trial.decode_s for trial in run.all(Trial)) < 0.5 * setup.compile_s


@pytest.mark.slow
def test_layers_that_the_compiler_cannot_follow_are_called_as_they_are(tiny_llama: Path, cache: Path) -> None:
    jobs = [make_job("awq", tiny_llama, cache, decode=mode) for mode in ("eager", "compile", "eager")]
    eager, compiled, again = run_jobs(jobs)
    assert compiled.one(SetUp).graph_breaks == 0
    said = [[trial.token_ids for trial in run.all(Trial)] for run in (eager, compiled, again)]
    assert said[0] == said[1] == said[2]


@pytest.mark.slow
def test_without_a_compiler_the_mode_is_refused_in_words(lively: Path, cache: Path, tmp_path: Path) -> None:
    jobs = [make_job("fp32", lively, cache, decode=mode) for mode in ("compile", "eager")]
    empty = tmp_path / "bin"
    empty.mkdir()
    nothing_kept = {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "PATH": str(empty),
        "CXX": "no-g++",
    }
    refused, eager = run_jobs(jobs, **nothing_kept)
    failed = refused.one(Failed)
    assert (failed.kind, failed.message) == ("unsupported", "torch.compile finds no C++ compiler")
    assert eager.one(Done).trials_measured == 2


@pytest.mark.slow
def test_warm_up_goes_on_until_two_trials_agree(lively: Path, cache: Path) -> None:
    job = make_job("fp32", lively, cache)
    runs = run_jobs([job, with_workload(job, warmup=0), with_workload(job, warmup=7)])
    grown, none, seven = (run.one(WarmedUp) for run in runs)
    assert 2 <= len(grown.trial_s) <= 1 + warmup.MAX_EXTRA_TRIALS
    assert grown.settled == warmup.settled(grown.trial_s)
    if len(grown.trial_s) > 2:
        assert not warmup.settled(grown.trial_s[:-1])
    assert (none.trial_s, none.settled) == ([], None)
    assert len(seven.trial_s) >= 7


@pytest.mark.parametrize(
    ("trial_s", "expected"),
    [([], None), ([1.0], None), ([2.0, 1.0, 1.01], True), ([1.0, 1.0, 1.03], False)],
)
def test_two_trials_agree_within_a_fiftieth(trial_s: list[float], expected: bool | None) -> None:
    assert warmup.settled(trial_s) is expected


def test_every_shape_of_prompts_is_met_before_trials_are_timed() -> None:
    """Triton tunes its kernels per number of rows, which takes seconds in the first prefill."""
    met: list[tuple[tuple[int, ...], Limits]] = []
    batches = [Batch(torch.zeros(1, width, dtype=torch.long), None) for width in (8, 8, 5, 7, 5)]
    warmup.run_other_shapes(lambda batch, limits: met.append((batch.ids.shape, limits)), batches)
    assert met == [((1, 5), Limits(2)), ((1, 7), Limits(2))]


# The static cache, step by step without a compiler: what a CUDA graph would record


def chatty(architecture: str, **config: object) -> PreTrainedModel:
    """A random two-layer model whose tokens depend on all that came before."""
    torch.manual_seed(3)
    return small_model(architecture, tie_word_embeddings=False, initializer_range=0.4, **config)


def padded_batch(rows: int, context: int) -> Batch:
    """Prompts of unequal length, the longest first."""
    torch.manual_seed(4)
    width = 11
    mask = torch.tensor([[0] * (3 * row) + [1] * (width - 3 * row) for row in range(rows)])
    ids = torch.randint(1, 128, (rows, width)) * mask
    before = torch.randint(1, 128, (1, context)).repeat(rows, 1) if context else None
    return Batch(ids, None if rows == 1 else mask, before)


@pytest.mark.parametrize("context", [0, 1, 9])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("architecture", "config", "groups"),
    [
        ("llama", {}, True),
        ("qwen2", {}, True),
        ("mistral", {"sliding_window": 6}, False),
        ("gemma3_text", {"sliding_window": 6, "head_dim": 16, "layer_types": LAYER_TYPES}, False),
    ],
)
@torch.inference_mode()
def test_a_static_cache_gives_the_tokens_of_a_growing_one(
    architecture: str, config: dict[str, object], groups: bool, rows: int, context: int
) -> None:
    model, cpu, new_tokens = chatty(architecture, **config), Device("cpu"), 14
    batch, other = padded_batch(rows, context), padded_batch(rows, 0)
    limits = Limits(new_tokens)
    growing = generate_stepwise(EagerStepper(model, new_tokens, cpu), cpu, batch, limits).token_ids
    with grouped_attention_in(model) as grouped:
        assert grouped is groups
        state = StepState(model, [other, batch], new_tokens, grouped)
        stepper = StaticStepper(model, state, new_tokens, cpu)
        generate_stepwise(stepper, cpu, other, limits)  # whose tokens must be forgotten
        fixed = generate_stepwise(stepper, cpu, batch, limits).token_ids
    assert model.config._attn_implementation == "sdpa"
    assert fixed.tolist() == growing.tolist()
    assert min(len(set(row)) for row in growing.tolist()) > 3


@pytest.mark.parametrize(("rows", "gemv"), [(1, True), (2, True), (3, False)])
def test_products_are_sums_up_to_a_precisions_rows(
    rows: int, gemv: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def compiler(device: Device, gemv: bool) -> Compile:
        asked.append(gemv)
        return lambda function: function

    monkeypatch.setattr(compile_mode, "compiler", compiler)
    loaded = LoadedModel(small_model("llama"), None, max_gemv_batch=2)
    cpu, batches = Device("cpu"), [padded_batch(rows, 0)]
    with torch.inference_mode(), set_up_generation("compile", loaded, batches, 3, cpu) as (generate, _):
        assert generate(batches[0], Limits(3)).token_ids.shape == (rows, 3)
    assert asked == [gemv]


# A capture that can't be, without a GPU to refuse it: torch's own switch is played.


@pytest.fixture
def strict_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`torch.cuda.set_sync_debug_mode` as it would be called, in order."""
    called: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", called.append)
    return called


def test_a_step_that_waits_is_refused_before_the_capture(strict_gpu: list[str]) -> None:
    torchs_words = RuntimeError("called a synchronizing CUDA operation")

    def step() -> None:
        raise torchs_words

    with pytest.raises(Unsupported) as refused:
        device.refuse_waiting(step)
    assert "waits for the GPU in every step" in str(refused.value)
    assert "CUDA operation" not in str(refused.value)
    assert "`raise torchs_words`" in str(refused.value)
    assert "test_decoding.py:" in str(refused.value)
    assert refused.value.hint == "--decode eager measures it"
    assert strict_gpu == ["error", "default"]


def test_other_errors_of_a_step_are_not_renamed(strict_gpu: list[str]) -> None:
    def step() -> None:
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        device.refuse_waiting(step)
    assert strict_gpu == ["error", "default"]


def test_a_step_that_never_waits_is_let_through(strict_gpu: list[str]) -> None:
    ran = []
    device.refuse_waiting(lambda: ran.append(1))
    assert ran == [1]


# INT8 products


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_few_rows_of_int8_are_padded_for_the_kernel_and_cut_again(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    kernel = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda left, right: seen.append(len(left)) or kernel(left, right))
    left, right = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((rows, 32), (32, 24)))
    assert torch.equal(int_mm(left, right), left.int() @ right.int())
    assert seen == [max(rows, 17)]
    scales = torch.rand(rows, 1)
    assert torch.equal(scaled_int_mm(left, right, scales), (left.int() @ right.int()) * scales)


# Kernel times


@pytest.mark.parametrize(
    ("spans", "covered"),
    [([], 0), ([(0, 4)], 4), ([(0, 4), (2, 3)], 4), ([(5, 6), (0, 4), (3, 5)], 6), ([(0, 1), (9, 10)], 2)],
)
def test_busy_time_is_the_union_of_kernels(spans: list[tuple[float, float]], covered: float) -> None:
    assert profiling.union(spans) == covered


def test_a_cpu_has_no_kernels_to_trace() -> None:
    profile = profiling.profile_generation(None, None, 4, Device("cpu"))  # type: ignore[arg-type]
    assert profile.decode is None
    assert profile.reason
