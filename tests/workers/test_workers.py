"""Every worker follows the protocol of `schemas.frames`: frames in order, exact counts, and useful failures.

Each test runs a real worker process the way the parent does, with a tiny model on the CPU.
"""

import errno
import importlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import pytest
import torch
from conftest import build_tiny_model
from golden_text import Golden
from transformers import AutoModelForCausalLM, AutoTokenizer
from worker_runs import PROMPTS, SharedWorkers, WorkerRun, copy_packages, cpu_job, run_worker, starting

from orchestrator.precisions.catalog import find_precisions
from orchestrator.precisions.interpreter import own_interpreter, worker_command, worker_environment
from schemas.frames import AnyFrame, Done, Failed, Loaded, Phase, Progress, Ready, Trial, Waiting
from schemas.job import Job
from workers.generation.prompts import make_batches
from workers.harness.measure import MIN_STEPS
from workers.protocol.errors import describe_failure

pytestmark = pytest.mark.slow

NEW_TOKENS = 12
LINEAR_PARAMETERS = 294_912
"""In all quantizable linear layers of a tiny model: 2 × (2 × 128·128 + 2 × 128·64 + 3 × 128·256)."""
UNEQUAL = ["Name a river.", "Why is the sky blue, and not green, when the sun is high?", "Go"]

ON_A_CPU = [name for name, precision in find_precisions().items() if "cpu" in precision.devices]
CASES = [("tiny_llama", precision) for precision in ON_A_CPU] + [
    # Qwen2's linear layers have biases.
    ("tiny_qwen2", precision)
    for precision in ("fp16", "int8", "int8-wo", "int8-dyn", "fp8-wo", "nf4", "awq")
]


@pytest.fixture(params=CASES, ids="-".join)
def job(request: pytest.FixtureRequest, cache: Path) -> Job:
    """The same small job for every precision."""
    model, precision = request.param
    return cpu_job(precision, request.getfixturevalue(model), cache)


@pytest.fixture
def run(job: Job, ask: SharedWorkers) -> WorkerRun:
    return ask(job)


@pytest.fixture(scope="module")
def odd_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of our packages with workers that print, lack a package, run out of memory, or never finish."""
    folder = copy_packages(tmp_path_factory.mktemp("lent"))
    plain = (folder / "workers/fp32.py").read_text()
    body = "def load(job: Job) -> LoadedModel:\n"
    noise = (
        "    import ctypes, os, subprocess\n"
        "    print('noise of Python', flush=True)\n"
        "    os.write(1, b'noise of a descriptor\\n')\n"
        "    ctypes.CDLL(None).puts(b'noise of C')\n"
        "    ctypes.CDLL(None).fflush(None)\n"
        "    subprocess.run(['echo', 'noise of a child'])\n"
        "    assert not os.read(0, 1)\n"
    )
    for name, lines in {
        "noisy": noise,
        "lacking": "    import no_such_package.inner\n",
        "hungry": "    raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB\\nand more lines')\n",
        "endless": "    import time\n    time.sleep(600)\n",
    }.items():
        (folder / f"workers/{name}.py").write_text(plain.replace(body, body + lines))
    preparing = plain.replace(
        "main(Backend(load))", "main(Backend(load, lambda *_: __import__('time').sleep(600), lambda _: 0))"
    )
    (folder / "workers/endless_preparation.py").write_text(preparing)
    return folder


def phases(run: WorkerRun) -> list[tuple[str, int | None]]:
    return [(phase.name, phase.trial) for phase in run.all(Phase) if phase.name != "prepare"]


def failure(run: WorkerRun) -> Failed:
    """A run's only Failed, which must be the last frame of its cell, with a message of one line."""
    failed = run.one(Failed)
    assert [frame for frame in run.frames if not isinstance(frame, Waiting)][-1] is failed
    assert run.status == 1
    assert not run.all(Done)
    assert failed.message
    assert "\n" not in failed.message
    return failed


# What every precision must do


def test_frames_come_in_order(run: WorkerRun, job: Job, ask: SharedWorkers) -> None:
    trials = [(name, index) for index in range(len(PROMPTS)) for name in ("prefill", "decode")]
    before = [("start", None), ("context", None), ("load", None), ("setup", None), ("warmup", None)]
    assert phases(run) == [*before, *trials, ("profile", None), ("end", None)]
    kinds = [
        frame.name if isinstance(frame, Phase) else type(frame).__name__
        for frame in run.frames
        if not isinstance(frame, Progress) and not (isinstance(frame, Phase) and frame.name == "prepare")
    ]
    trial = ["prefill", "decode", "Trial"]
    head = ["start", "context", "Ready", "load", "Loaded", "setup", "SetUp", "warmup", "WarmedUp"]
    tail = ["profile", "Profile", "end", "Done", "Waiting"]
    assert kinds == [*head, *trial * len(PROMPTS), *tail]
    assert ask.finish(job) == 0
    times = [frame.at_ns for frame in run.frames if isinstance(frame, Phase | Ready | Done)]
    assert times == sorted(times)


def test_ready_describes_process_and_device(run: WorkerRun) -> None:
    ready = run.one(Ready)
    assert ready.pid == run.pid
    assert (ready.device, ready.device_uuid) == ("cpu", None)
    assert ready.python == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "transformers"} <= set(ready.versions)
    assert ready.versions == {name: importlib.metadata.version(name) for name in ready.versions}


def test_versions_cover_the_packages_of_the_header(ask: SharedWorkers, tiny_llama: Path, cache: Path) -> None:
    job = cpu_job("int8", tiny_llama, cache)
    assert set(ask(job).one(Ready).versions) == set(job.packages) >= {"bitsandbytes"}


def test_every_token_is_generated_and_timed(run: WorkerRun) -> None:
    for index, trial in enumerate(run.all(Trial)):
        assert (trial.index, trial.batch_size, trial.new_tokens) == (index, 1, NEW_TOKENS)
        assert not trial.cut_short
        assert len(trial.token_ids) == NEW_TOKENS
        assert len(trial.token_s) == NEW_TOKENS - 1
        assert min(trial.prefill_s, *trial.token_s) > 0
        assert trial.enqueue_s <= trial.decode_s
        # The span includes the loop's overhead, so they agree, but never exactly.
        assert sum(trial.token_s) == pytest.approx(trial.decode_s, rel=0.02, abs=1e-3)
        assert sum(trial.token_s) <= trial.decode_s
    done = run.one(Done)
    assert (done.trials_planned, done.trials_measured) == (2, 2)
    assert done.sample_text


def test_spans_fit_between_their_phases(run: WorkerRun) -> None:
    at_ns = {(phase.name, phase.trial): phase.at_ns for phase in run.all(Phase)}
    for trial in run.all(Trial):
        assert trial.prefill_s <= (at_ns["decode", trial.index] - at_ns["prefill", trial.index]) / 1e9
        end_ns = at_ns.get(("prefill", trial.index + 1), at_ns["end", None])
        assert trial.decode_s <= (end_ns - at_ns["decode", trial.index]) / 1e9


def test_parameters_are_those_of_the_unquantized_model(run: WorkerRun) -> None:
    biases = 2 * (128 + 2 * 64)  # Qwen2 has biases on queries, keys and values
    assert run.one(Loaded).parameters - 361_088 in (0, biases)


def test_the_worker_waits_for_the_parent_at_each_phase(tiny_llama: Path, cache: Path) -> None:
    job = cpu_job("fp32", tiny_llama, cache)
    with starting(job, "workers.fp32") as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(msgspec.json.encode(job))
        edge = None
        while edge is None or edge.name != "prefill":
            edge = next_phase(process)
        time.sleep(1)  # far longer than the prefill of a tiny model
        edge_over_ns = time.monotonic_ns()
        assert next_phase(process).at_ns > edge_over_ns


def next_phase(process: subprocess.Popen[bytes]) -> Phase:
    """Acknowledge the last phase (or end the job's line), and read frames up to the next one."""
    assert process.stdin
    assert process.stdout
    process.stdin.write(b"\n")
    process.stdin.flush()
    for line in process.stdout:
        frame = msgspec.json.decode(line, type=AnyFrame)
        if isinstance(frame, Phase):
            return frame
    raise AssertionError("the worker ended")


# Stored weights


FORMATS = ("fp32", "fp16", "bf16", "int8", "int8-wo", "int8-dyn", "fp8-wo", "nf4", "fp4", "awq")
ROWS = 2 * 1024
"""Output rows of all quantizable linear layers."""
OTHER_PARAMETERS = 66_176
"""Embeddings, tied to the head, and norms."""
INVERSE_FREQUENCIES = 128
"""Bytes of the rotary embeddings."""


@pytest.fixture
def loaded(ask: SharedWorkers, tiny_llama: Path, cache: Path) -> dict[str, Loaded]:
    return {name: ask(cpu_job(name, tiny_llama, cache)).one(Loaded) for name in FORMATS}


def test_unquantized_weights_have_the_bits_of_their_format(loaded: dict[str, Loaded]) -> None:
    parameters = LINEAR_PARAMETERS + OTHER_PARAMETERS
    assert loaded["fp32"].parameters == parameters
    assert loaded["fp32"].weight_bytes == {"float32": 4 * parameters + INVERSE_FREQUENCIES}
    for name, dtype in (("fp16", "float16"), ("bf16", "bfloat16")):
        assert loaded[name].weight_bytes == {dtype: 2 * parameters, "float32": INVERSE_FREQUENCIES}
        assert loaded[name].compute_dtype == dtype


def test_8_bit_weights_have_the_bits_of_their_format(loaded: dict[str, Loaded]) -> None:
    scales = {"float32": 4 * ROWS + INVERSE_FREQUENCIES}
    other = 2 * OTHER_PARAMETERS
    assert loaded["int8"].weight_bytes == {"int8": LINEAR_PARAMETERS, "float16": other} | scales
    zero_points = ROWS
    for name in ("int8-wo", "int8-dyn"):
        integers = {"int8": LINEAR_PARAMETERS + zero_points}
        assert loaded[name].weight_bytes == integers | {"bfloat16": other} | scales
    assert loaded["fp8-wo"].weight_bytes == {"float8_e4m3fn": LINEAR_PARAMETERS, "bfloat16": other} | scales


def test_4_bit_weights_have_the_bits_of_their_format(loaded: dict[str, Loaded]) -> None:
    block_scales, codebooks = 4 * LINEAR_PARAMETERS // 64, 14 * 4 * 16
    for name in ("nf4", "fp4"):
        assert loaded[name].weight_bytes == {
            "uint8": LINEAR_PARAMETERS // 2,
            "float16": 2 * OTHER_PARAMETERS,
            "float32": block_scales + codebooks + INVERSE_FREQUENCIES,
        }
    groups = LINEAR_PARAMETERS // 128
    assert loaded["awq"].weight_bytes == {
        "int32": LINEAR_PARAMETERS // 2 + groups // 2,
        "float16": 2 * (OTHER_PARAMETERS + groups),
        "float32": INVERSE_FREQUENCIES,
    }


def test_stored_bytes_are_known_by_kind_and_all_read_by_a_step(loaded: dict[str, Loaded]) -> None:
    kinds = {name: each.weight_kinds for name, each in loaded.items()}
    groups = LINEAR_PARAMETERS // 128
    assert kinds["int8"]["matrices int8"] == LINEAR_PARAMETERS
    assert kinds["int8"]["scales float32"] == 4 * ROWS
    assert kinds["awq"]["matrices int32"] == LINEAR_PARAMETERS // 2
    assert kinds["awq"]["zero points int32"] == groups // 2
    assert kinds["awq"]["scales float16"] == 2 * groups
    for name, each in loaded.items():
        assert sum(kinds[name].values()) == sum(each.weight_bytes.values())
        assert each.costs  # the embeddings are tied to the head, so a step reads everything
        assert each.costs.step_weight_bytes == sum(each.weight_bytes.values())


@pytest.mark.parametrize(
    ("precision", "quantized"),
    [
        ("int8", "Linear8bitLt"),
        ("int8-t0", "Linear8bitLt"),
        ("int8-wo", "Linear[Int8Tensor]"),
        ("int8-dyn", "Linear[Int8Tensor]"),
        ("fp8-wo", "Linear[Float8Tensor]"),
        ("nf4", "Linear4bit"),
        ("fp4", "Linear4bit"),
        ("awq", "WQLinear_GEMM"),
    ],
)
def test_every_linear_layer_but_the_head_is_quantized(
    precision: str, quantized: str, ask: SharedWorkers, tiny_llama: Path, cache: Path
) -> None:
    loaded = ask(cpu_job(precision, tiny_llama, cache)).one(Loaded)
    assert loaded.linear_classes == {quantized: 14, "Linear": 1}
    assert loaded.unquantized_linears == {"lm_head": 1}


@pytest.mark.parametrize(
    ("precision", "settings"),
    [
        ("nf4", {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": "False"}),
        ("fp4", {"bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": "float16"}),
        ("int8-wo", {"quant_type": "Int8WeightOnlyConfig", "granularity": "PerRow(dim=-1)"}),
        (
            "int8-dyn",
            {"quant_type": "Int8DynamicActivationInt8WeightConfig", "act_mapping_type": "symmetric"},
        ),
        ("fp8-wo", {"quant_type": "Float8WeightOnlyConfig", "weight_dtype": "torch.float8_e4m3fn"}),
    ],
)
def test_settings_that_select_kernels_are_recorded(
    precision: str, settings: dict[str, str], ask: SharedWorkers, tiny_llama: Path, cache: Path
) -> None:
    assert settings.items() <= ask(cpu_job(precision, tiny_llama, cache)).one(Loaded).settings.items()


@pytest.mark.parametrize(("precision", "threshold"), [("int8", 6.0), ("int8-t0", 0.0)])
def test_the_two_int8_precisions_differ_in_their_threshold(
    precision: str, threshold: float, tiny_llama: Path, cache: Path
) -> None:
    worker = importlib.import_module(find_precisions()[precision].module)
    model = worker.load(cpu_job(precision, tiny_llama, cache)).model
    thresholds = {layer.state.threshold for layer in model.modules() if hasattr(layer, "state")}
    assert thresholds == {threshold}


# Generated tokens


def generated(folder: Path, prompts: list[str]) -> list[list[int]]:
    """Tokens of transformers' generate() for each prompt separately, at full length."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(
            **inputs, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, eos_token_id=None
        )
        answers.append(tokens[0, inputs.input_ids.shape[1] :].tolist())
    return answers


def test_greedy_tokens_are_those_of_generate(ask: SharedWorkers, lively: Path, cache: Path) -> None:
    trials = ask(cpu_job("fp32", lively, cache, prompts=UNEQUAL)).all(Trial)
    answers = [trial.token_ids for trial in trials]
    assert answers == generated(lively, UNEQUAL)
    assert min(len(set(answer)) for answer in answers) > 3  # a constant answer would prove nothing


def test_a_batch_answers_each_prompt_as_if_alone(ask: SharedWorkers, lively: Path, cache: Path) -> None:
    # A trial records only its first row, so each prompt comes first once.
    rotated = [UNEQUAL[(first + place) % 3] for first in range(3) for place in range(3)]
    alone = ask(cpu_job("fp32", lively, cache, prompts=UNEQUAL)).all(Trial)
    together = ask(cpu_job("fp32", lively, cache, prompts=rotated, batch_size=3)).all(Trial)
    widths = [trial.prompt_tokens for trial in alone]
    assert len(set(widths)) == 3
    assert [(trial.batch_size, trial.prompt_tokens) for trial in together] == [(3, max(widths))] * 3
    assert [trial.token_ids for trial in together] == [trial.token_ids for trial in alone]


def test_prompts_are_cut_or_repeated_to_the_requested_length(
    ask: SharedWorkers, tiny_llama: Path, cache: Path
) -> None:
    job = cpu_job("fp32", tiny_llama, cache, prompt_tokens=50, batch_size=2)
    trial = ask(job).one(Trial)
    assert (trial.prompt_tokens, trial.batch_size) == (50, 2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ids = tokenizer(PROMPTS[0]).input_ids
    for length in (1, 5, len(ids), 50, 200):
        (batch,) = make_batches(
            cpu_job("fp32", tiny_llama, cache, prompt_tokens=length, batch_size=2), tokenizer, 512
        )
        assert batch.ids.shape == (2, length)
        assert batch.mask is None
        assert batch.ids[0].tolist() == (ids * 200)[:length]


@pytest.mark.parametrize("precision", ["fp16", "int8-wo", "awq"])
def test_random_weights_need_no_tokenizer(precision: str, cache: Path) -> None:
    job = cpu_job(precision, "qwen2.5-0.5b", cache, prompts=["?"], prompt_tokens=8, new_tokens=2, warmup=0)
    run = run_worker(job)
    assert run.one(Done).sample_text is None
    assert [phase.name for phase in run.all(Phase)].count("prepare") == 0
    trial = run.one(Trial)
    assert (trial.prompt_tokens, len(trial.token_ids)) == (8, 2)
    loaded = run.one(Loaded)
    assert loaded.parameters == 494_032_768
    linears = 357_826_560  # 24 × (2 × 896·896 + 2 × 896·128 + 3 × 896·4864)
    if precision == "awq":
        assert loaded.linear_classes == {"WQLinear_GEMM": 168, "Linear": 1}
        assert loaded.weight_bytes["int32"] == linears // 2 + linears // 128 // 2
    elif precision == "int8-wo":
        assert loaded.linear_classes == {"Linear[Int8Tensor]": 168, "Linear": 1}
        rows = 24 * (2 * 896 + 2 * 128 + 2 * 4864 + 896)
        assert loaded.weight_bytes["int8"] == linears + rows
        inverse_frequencies = 256
        assert loaded.weight_bytes["float32"] == 4 * rows + inverse_frequencies
    else:
        assert loaded.weight_bytes["float16"] == 2 * 494_032_768


# Budget


def test_a_spent_budget_still_yields_a_figure(ask: SharedWorkers, tiny_llama: Path, cache: Path) -> None:
    job = cpu_job("fp32", tiny_llama, cache, prompts=UNEQUAL, new_tokens=100, budget_s=1e-6)
    run = ask(job)
    trial = run.one(Trial)
    assert trial.cut_short
    assert trial.new_tokens == len(trial.token_ids) == 1 + MIN_STEPS == 9
    done = run.one(Done)
    assert (done.trials_planned, done.trials_measured) == (3, 1)


# Failures


def test_printed_text_never_mixes_with_frames(odd_workers: Path, tiny_llama: Path, cache: Path) -> None:
    run = run_worker(cpu_job("fp32", tiny_llama, cache), "workers.noisy", odd_workers)
    assert run.one(Done).trials_measured == 2
    for source in ("Python", "a descriptor", "C", "a child"):
        assert f"noise of {source}\n" in run.log


def test_a_missing_module_comes_with_an_install_command(
    odd_workers: Path, tiny_llama: Path, cache: Path
) -> None:
    failed = failure(run_worker(cpu_job("fp32", tiny_llama, cache), "workers.lacking", odd_workers))
    assert (failed.kind, failed.hint) == ("missing-package", "pip install no_such_package")
    assert failed.traceback
    assert "workers/lacking.py" in failed.traceback


def test_a_missing_package_comes_with_an_install_command(tiny_llama: Path, cache: Path) -> None:
    job = cpu_job("fp32", tiny_llama, cache, packages=["torch", "no-such-distribution"])
    failed = failure(run_worker(job))
    assert (failed.kind, failed.hint) == ("missing-package", "pip install no-such-distribution")


def test_running_out_of_memory_has_its_own_kind(odd_workers: Path, tiny_llama: Path, cache: Path) -> None:
    failed = failure(run_worker(cpu_job("fp32", tiny_llama, cache), "workers.hungry", odd_workers))
    assert failed.kind == "out-of-memory"
    assert failed.message == "CUDA out of memory. Tried to allocate 2 GiB"


def test_more_than_the_models_context_is_refused(
    ask: SharedWorkers, tiny_llama: Path, cache: Path, golden: Golden
) -> None:
    fits = cpu_job("fp32", tiny_llama, cache, prompt_tokens=500, prompts=["Go"], new_tokens=12, warmup=0)
    assert ask(fits).one(Trial).prompt_tokens == 500
    over = msgspec.structs.replace(fits, workload=msgspec.structs.replace(fits.workload, prompt_tokens=501))
    failed = ask(over).one(Failed)
    assert failed.kind == "unsupported"
    assert re.findall(r"\d+", failed.message) == ["513", "512"]
    golden([failed.message, failed.hint or ""])
    assert ask.finish(over) == 1  # because a job failed


def test_shapes_that_do_not_fit_the_format_are_refused(tmp_path: Path, cache: Path, golden: Golden) -> None:
    folder = build_tiny_model(tmp_path / "narrow", "llama", hidden_size=96, intermediate_size=192)
    failed = failure(run_worker(cpu_job("int4-wo", folder, cache)))
    assert failed.kind == "unsupported"
    assert "96 × 192" in failed.message
    golden([failed.message, failed.hint or ""])


@pytest.mark.parametrize("precision", ["fp32", "awq"])
def test_weights_that_cannot_be_read_fail_in_one_line(
    precision: str, tiny_llama: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "broken")
    weights = tmp_path / "broken/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    failed = failure(run_worker(cpu_job(precision, tmp_path / "broken", tmp_path / "cache")))
    assert failed.traceback
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert left == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that torch can use")
def test_a_gpu_that_torch_does_not_see_is_refused(tiny_llama: Path, cache: Path, golden: Golden) -> None:
    failed = failure(run_worker(cpu_job("fp32", tiny_llama, cache, device="cuda:0")))
    assert failed.kind == "unsupported"
    assert "--device cpu" in (failed.hint or "")
    golden([failed.message.replace(torch.__version__, "VERSION"), failed.hint or ""])


@pytest.mark.parametrize("line", [b"", b"\n", b"{}\n", b"nonsense\n"])
def test_an_invalid_job_is_a_failure(line: bytes, tiny_llama: Path, cache: Path) -> None:
    with starting(cpu_job("fp32", tiny_llama, cache), "workers.fp32") as process:
        out, log = process.communicate(line, timeout=60)
    frames = msgspec.json.Decoder(AnyFrame).decode_lines(out)
    assert failure(WorkerRun(frames, process.returncode, process.pid, log.decode())).kind == "error"


# Process exit

PARENT = """\
import json, subprocess, sys
command, environment, job = json.loads(sys.stdin.readline())
worker = subprocess.Popen(
    command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    start_new_session=True,
)
worker.stdin.write((job + "\\n" * 100).encode())  # the job, and all acknowledgements ahead
worker.stdin.flush()
print(worker.pid, flush=True)
for line in worker.stdout:
    print(line.decode(), end="", flush=True)
"""


@pytest.mark.parametrize(
    ("module", "last"), [("workers.endless", "load"), ("workers.endless_preparation", "prepare")]
)
def test_a_worker_ends_with_its_parent(
    module: str, last: str, odd_workers: Path, tiny_llama: Path, cache: Path
) -> None:
    job = msgspec.json.encode(cpu_job("fp32", tiny_llama, cache)).decode()
    own = own_interpreter()
    start = [worker_command(own, module), worker_environment(own, odd_workers), job]
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdin
        assert parent.stdout
        parent.stdin.write(json.dumps(start).encode() + b"\n")
        parent.stdin.flush()
        worker = psutil.Process(int(parent.stdout.readline()))
        decoder = msgspec.json.Decoder(AnyFrame)
        frames = map(decoder.decode, parent.stdout)
        assert any(isinstance(frame, Phase) and frame.name == last for frame in frames)
        family = family_of(worker, size=2 if last == "prepare" else 1)
        assert all(alive(process) for process in family)
        parent.kill()
    wait_until(lambda: not any(map(alive, family)))
    survivors = [process for process in family if alive(process)]
    for process in survivors:
        process.kill()
    assert survivors == []


def family_of(worker: psutil.Process, size: int) -> list[psutil.Process]:
    """A worker and its descendants, once there are as many as expected."""
    wait_until(lambda: len(worker.children(recursive=True)) >= size - 1)
    time.sleep(3)  # until a new child has asked Linux to end it with its parent
    family = [worker, *worker.children(recursive=True)]
    assert len(family) == size
    return family


def wait_until(condition: Callable[[], bool], limit_s: float = 60) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.05)


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("error", "kind", "hint"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "error", "QBENCH_CACHE"),
        (OSError("no file named model.safetensors"), "bad-model", "--model"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "out-of-memory", "smaller"),
        (RuntimeError("NVML_SUCCESS == r INTERNAL ASSERT FAILED"), "out-of-memory", "smaller"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "out-of-memory", "smaller"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out-of-memory", "smaller"),
        (ModuleNotFoundError("No module named 'awq'", name="awq"), "missing-package", "pip install awq"),
        (ImportError("cannot import name X from transformers", name="transformers"), "error", None),
    ],
)
def test_failures_are_classified_by_their_remedy(error: Exception, kind: str, hint: str | None) -> None:
    failed = describe_failure(error)
    assert failed.kind == kind
    assert failed.message in str(error)
    assert failed.hint is None if hint is None else hint in (failed.hint or "")


def test_a_cpu_allocation_failure_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert describe_failure(caught.value).kind == "out-of-memory"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "backend='b' raised:\n  TypeError: no rule\n\nSet TORCH_LOGS",
            "backend='b' raised: TypeError: no rule",
        ),
        ("\nno room\nfor it", "no room"),
        ("raised:", "raised:"),
        ("", "RuntimeError"),
    ],
)
def test_a_failures_message_is_the_line_with_the_error(text: str, message: str) -> None:
    assert describe_failure(RuntimeError(text)).message == message
