"""Decode modes: the same tokens from each, several cells from one worker, and clear refusals.

The answers of these small models depend on the whole prompt, so that a wrong position, mask or cache changes
the tokens.
"""

import importlib
import re
from pathlib import Path

import msgspec
import pytest
import torch
from golden_text import Golden
from small_models import small_model
from transformers import PreTrainedModel
from worker_runs import SharedWorkers, cpu_job, run_jobs

from orchestrator.precisions.catalog import find_precisions
from schemas.frames import Done, Failed, Loaded, Phase, SetUp, Trial, WarmedUp
from schemas.job import Job
from workers.generation import compile_mode, cuda_graph
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


def tokens(job: Job, ask: SharedWorkers) -> dict[str, list[list[int]]]:
    """Token ids of the job's prompts in every mode that a CPU has."""
    runs = [ask(with_workload(job, decode=mode)) for mode in MODES]
    assert all(run.all(Done) for run in runs), [run.all(Failed) for run in runs]
    return {
        mode: [trial.token_ids for trial in run.all(Trial)] for mode, run in zip(MODES, runs, strict=True)
    }


def with_workload(job: Job, **fields: object) -> Job:
    return msgspec.structs.replace(job, workload=msgspec.structs.replace(job.workload, **fields))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3])
def test_all_modes_give_the_same_tokens(
    batch_size: int, ask: SharedWorkers, lively: Path, cache: Path
) -> None:
    job = cpu_job("fp32", lively, cache, prompts=UNEQUAL, batch_size=batch_size)
    answers = tokens(job, ask)
    assert answers["compile"] == answers["eager"] == answers["generate"]
    assert len(answers["eager"]) == 3 // batch_size
    assert min(len(set(answer)) for answer in answers["eager"]) > 3  # a constant answer would prove nothing


@pytest.mark.slow
def test_context_in_the_cache_acts_like_context_in_the_prompt(
    ask: SharedWorkers, lively: Path, cache: Path
) -> None:
    jobs = [
        cpu_job("fp32", lively, cache, prompts=UNEQUAL, depth=21, batch_size=3, decode=mode)
        for mode in ("eager", "compile")
    ]
    shallow = cpu_job("fp32", lively, cache, prompts=UNEQUAL, batch_size=3)
    eager, compiled, without = (ask(job).one(Trial).token_ids for job in [*jobs, shallow])
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
    assert ask(alone).one(Trial).token_ids == made[0, whole.shape[1] :].tolist()


@pytest.mark.slow
def test_a_worker_loads_once_and_survives_a_refusal(lively: Path, cache: Path, golden: Golden) -> None:
    job = cpu_job("fp32", lively, cache)
    first, refused, again = run_jobs([job, with_workload(job, decode="graph"), job])
    assert len(first.all(Loaded)) == 1
    assert not again.all(Loaded)
    failed = refused.one(Failed)
    assert failed.kind == "unsupported"
    assert "--decode eager" in (failed.hint or "")
    golden([failed.message, failed.hint or ""])
    assert [trial.token_ids for trial in again.all(Trial)] == [trial.token_ids for trial in first.all(Trial)]
    assert [phase.name for phase in again.all(Phase)][:2] == ["setup", "warmup"]


@pytest.mark.slow
def test_compilation_is_timed_separately(ask: SharedWorkers, lively: Path, cache: Path) -> None:
    run = ask(cpu_job("fp32", lively, cache, decode="compile"))
    setup = run.one(SetUp)
    assert setup.compile_s is not None
    assert 0 < setup.compile_s <= setup.setup_s
    assert setup.graph_breaks == 0
    assert setup.cache_tokens is not None
    assert setup.cache_tokens % 16 == 0
    at_ns = {phase.name: phase.at_ns for phase in run.all(Phase)}
    assert setup.setup_s <= (at_ns["warmup"] - at_ns["setup"]) / 1e9  # so it finished before any trial


@pytest.mark.slow
def test_layers_that_the_compiler_cannot_trace_are_called_eagerly(
    ask: SharedWorkers, tiny_llama: Path, cache: Path
) -> None:
    job = cpu_job("awq", tiny_llama, cache)
    longer = with_workload(job, new_tokens=job.workload.new_tokens + 1)
    eager, compiled, again = map(ask, (job, with_workload(job, decode="compile"), longer))
    assert compiled.one(SetUp).graph_breaks == 0
    count = job.workload.new_tokens
    before, during, after = (
        [trial.token_ids[:count] for trial in run.all(Trial)] for run in (eager, compiled, again)
    )
    assert before == during == after


@pytest.mark.slow
def test_without_a_compiler_only_compile_is_refused(
    lively: Path, cache: Path, tmp_path: Path, golden: Golden
) -> None:
    jobs = [cpu_job("fp32", lively, cache, decode=mode) for mode in ("compile", "eager")]
    empty = tmp_path / "bin"
    empty.mkdir()
    no_compiler = {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "PATH": str(empty),
        "CXX": "no-g++",
    }
    refused, eager = run_jobs(jobs, **no_compiler)
    failed = refused.one(Failed)
    assert failed.kind == "unsupported"
    golden([failed.message, failed.hint or ""])
    assert eager.one(Done).trials_measured == 2


@pytest.mark.slow
def test_warm_up_continues_until_two_trials_agree(ask: SharedWorkers, lively: Path, cache: Path) -> None:
    job = cpu_job("fp32", lively, cache)
    runs = map(ask, (job, with_workload(job, warmup=0), with_workload(job, warmup=7)))
    grown, none, seven = (run.one(WarmedUp) for run in runs)
    assert 2 <= len(grown.trial_s) <= 1 + warmup.MAX_EXTRA_TRIALS
    assert grown.settled == warmup.settled(grown.trial_s)
    if len(grown.trial_s) > 2:
        assert not warmup.settled(grown.trial_s[:-1])
    assert (none.trial_s, none.settled) == ([], None)
    assert len(seven.trial_s) >= 7


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["nf4", "fp4", "int8-wo", "int8-dyn", "fp8-wo"])
def test_quantized_formats_only_diverge_at_near_ties(
    precision: str, ask: SharedWorkers, lively: Path, cache: Path
) -> None:
    job = cpu_job(precision, lively, cache, prompts=UNEQUAL)
    answers = tokens(job, ask)
    assert answers["generate"] == answers["eager"]
    loaded = importlib.import_module(find_precisions()[precision].module).load(job)
    batches = make_batches(job, loaded.tokenizer, loaded.model.config.vocab_size)
    for batch, eager, compiled in zip(batches, answers["eager"], answers["compile"], strict=True):
        assert len(set(eager)) > 3  # a constant answer would prove nothing
        assert logit_loss_at_divergence(loaded.model, batch, eager, compiled) < 0.1


@torch.inference_mode()
def logit_loss_at_divergence(
    model: PreTrainedModel, batch: Batch, chosen: list[int], other: list[int]
) -> float:
    """By how many standard deviations the logit of `chosen` is higher at the first token that differs."""
    steps = [step for step, pair in enumerate(zip(chosen, other, strict=True)) if len(set(pair)) > 1]
    if not steps:
        return 0.0
    context = torch.cat([batch.ids, torch.tensor([chosen[: steps[0]]], dtype=torch.long)], dim=1)
    logits = model(context).logits[0, -1].float()
    return float((logits[chosen[steps[0]]] - logits[other[steps[0]]]) / logits.std())


@pytest.mark.parametrize(
    ("trial_s", "expected"),
    [([], None), ([1.0], None), ([2.0, 1.0, 1.01], True), ([1.0, 1.0, 1.03], False)],
)
def test_two_trials_agree_within_2_percent(trial_s: list[float], expected: bool | None) -> None:
    assert warmup.settled(trial_s) is expected


def test_every_prompt_shape_runs_before_trials_are_timed() -> None:
    """Triton tunes its kernels for each number of rows, which needs seconds in the first prefill."""
    met: list[tuple[tuple[int, ...], Limits]] = []
    batches = [Batch(torch.zeros(1, width, dtype=torch.long), None) for width in (8, 8, 5, 7, 5)]
    warmup.run_other_shapes(lambda batch, limits: met.append((batch.ids.shape, limits)), batches)
    assert met == [((1, 5), Limits(2)), ((1, 7), Limits(2))]


# The static cache without a compiler: the steps that a CUDA graph would record


def chatty(architecture: str, **config: object) -> PreTrainedModel:
    """A random two-layer model whose tokens depend on everything before them."""
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
        generate_stepwise(stepper, cpu, other, limits)  # its tokens must be forgotten
        fixed = generate_stepwise(stepper, cpu, batch, limits).token_ids
    assert model.config._attn_implementation == "sdpa"
    assert fixed.tolist() == growing.tolist()
    assert min(len(set(row)) for row in growing.tolist()) > 3


@pytest.mark.parametrize(("rows", "gemv"), [(1, True), (2, True), (3, False)])
def test_products_are_reductions_up_to_a_precisions_max_gemv_batch(
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


# Refused captures, with torch's switch faked, since there is no GPU to refuse them.


@pytest.fixture
def strict_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls of `torch.cuda.set_sync_debug_mode`, in order."""
    called: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", called.append)
    return called


def test_a_step_that_waits_is_refused_before_the_capture(strict_gpu: list[str], golden: Golden) -> None:
    refusal = RuntimeError("called a synchronizing CUDA operation")

    def step() -> None:
        raise refusal

    with pytest.raises(Unsupported) as refused:
        cuda_graph.refuse_waiting(step)
    assert "CUDA operation" not in str(refused.value)
    assert "`raise refusal`" in str(refused.value)
    assert "test_decoding.py:" in str(refused.value)
    golden([re.sub(r"py:\d+", "py:LINE", str(refused.value)), refused.value.hint or ""])
    assert strict_gpu == ["error", "default"]


def test_other_errors_of_a_step_are_reported_unchanged(strict_gpu: list[str]) -> None:
    def step() -> None:
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        cuda_graph.refuse_waiting(step)
    assert strict_gpu == ["error", "default"]


def test_a_step_that_never_waits_is_accepted(strict_gpu: list[str]) -> None:
    ran = []
    cuda_graph.refuse_waiting(lambda: ran.append(1))
    assert ran == [1]


# INT8 products


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_few_rows_of_int8_are_padded_for_the_kernel(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
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
