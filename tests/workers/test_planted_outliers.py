"""Planted outliers appear only in the inputs that LLM.int8 searches, and nothing overflows."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from commands import command, environment, run
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BitsAndBytesConfig, LlamaConfig, PreTrainedModel

from orchestrator.planning.models import random_names
from orchestrator.records.store import read_run
from schemas.job import PLANTED_OUTLIERS_WARNING
from workers.models.planted_outliers import NORMS, READERS, SCALE, outlier_channels, plant_outliers
from workers.models.random_model import (
    build_random_model,
    random_config,
    random_prompt_ids,
    random_state_dict,
)

THRESHOLD = 6.0
"""bitsandbytes multiplies columns with values of at least this in FP16."""
INT8 = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=THRESHOLD)


def deep_config(layers: int = 48) -> LlamaConfig:
    """Narrow, but as deep as the deepest published architecture."""
    return LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        tie_word_embeddings=False,
    )


def inputs_of_linears(model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The input of each linear layer but the head by name, shape (tokens, features); and the logits."""
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0][0]}))
    with torch.inference_mode():
        logits = model(torch.tensor([random_prompt_ids(512, 64, seed=0)])).logits
    return seen, logits


@pytest.mark.parametrize("count", [0, 1, 6, 128])
@pytest.mark.parametrize("quantization", [None, INT8], ids=["fp16", "int8"])
def test_planted_channels_exceed_the_threshold_in_every_layer(
    count: int, quantization: BitsAndBytesConfig | None
) -> None:
    config = deep_config()
    loading = {} if quantization is None else {"quantization_config": quantization}
    model = build_random_model(config, "cpu", torch.float16, 3, count, **loading)
    inputs, logits = inputs_of_linears(model)
    assert logits.isfinite().all()
    assert len(inputs) == 7 * config.num_hidden_layers
    channels = set(outlier_channels(count, config.hidden_size, 3))
    shares = []
    for name, values in inputs.items():
        assert values.isfinite().all(), name
        outliers = values.abs() >= THRESHOLD
        columns = set(outliers.any(0).nonzero().flatten().tolist())
        assert columns == (channels if name.endswith(READERS) else set()), name
        shares += [outliers[:, column].float().mean().item() for column in columns]
    if count:
        assert sum(shares) / len(shares) > 0.9  # of all tokens


@settings(max_examples=20, deadline=None)
@given(count=st.integers(0, 128), seed=st.integers(0, 2**40))
def test_outliers_do_not_change_the_models_output(count: int, seed: int) -> None:
    config = deep_config(layers=2)
    plain, planted = (
        inputs_of_linears(build_random_model(config, "cpu", torch.float32, seed, outliers))[1]
        for outliers in (0, count)
    )
    torch.testing.assert_close(planted, plain, rtol=1e-3, atol=1e-4)


@given(count=st.integers(0, 128), seed=st.integers(0), size=st.integers(128, 8192))
def test_channels_depend_only_on_the_seed(count: int, seed: int, size: int) -> None:
    channels = outlier_channels(count, size, seed)
    assert len(set(channels)) == count
    assert channels == outlier_channels(count, size, seed) == tuple(sorted(channels))
    assert all(0 <= channel < size for channel in channels)


def test_another_seed_gives_other_channels() -> None:
    assert outlier_channels(6, 3584, 0) != outlier_channels(6, 3584, 1)


def test_every_precision_gets_the_same_model() -> None:
    config = deep_config(layers=2)
    fp16 = build_random_model(config, "cpu", torch.float16, 5, 6)
    int8 = build_random_model(config, "cpu", torch.float16, 5, 6, quantization_config=INT8)
    rounded = dict(int8.named_parameters())
    for name, weight in fp16.named_parameters():
        other = rounded[name]
        if other.dtype == torch.int8:
            step = weight.abs().amax(1, keepdim=True) / 127
            assert ((other * step - weight).abs() <= 0.51 * step + 1e-4).all(), name
        else:
            assert torch.equal(other, weight), name


@pytest.mark.parametrize("name", random_names())
def test_every_architecture_has_the_norms_and_their_readers(name: str) -> None:
    config = random_config(name)
    names = [each.removesuffix(".weight") for each in random_state_dict(config, "cpu", torch.float16, 0)]
    for part in (*NORMS, *READERS):
        assert sum(each.endswith(part) for each in names) == config.num_hidden_layers
    norms = {each.rpartition(".")[2] for each in names if "norm" in each}
    assert norms == {*NORMS, "norm"}  # the last one only feeds the output head, which no precision quantizes


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("model.layers.0.input_layernorm.weight", SCALE),
        ("model.layers.0.mlp.up_proj.weight", 1 / SCALE),
        ("model.layers.0.mlp.down_proj.weight", 1),
        ("model.layers.0.self_attn.q_proj.bias", 1),
        ("model.norm.weight", 1),
    ],
)
def test_only_norms_and_their_readers_are_changed(name: str, changed: float) -> None:
    weight = torch.ones(4) if "norm" in name or "bias" in name else torch.ones(2, 4)
    plant_outliers(name, weight, (1, 3))
    assert weight[..., [0, 2]].eq(1).all()
    assert weight[..., [1, 3]].eq(changed).all()


AWQ = """\
    import json
    import torch
    from awq.modules.linear import gemm
    from transformers import LlamaConfig
    from schemas.job import Job, ModelSource, Workload
    from workers.quantization import awq_model

    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=512,
    )
    awq_model.random_config = lambda name: config
    source = ModelSource(kind="random", location="tiny", name="tiny", outliers=6)
    job = Job(
        precision="awq", model=source, workload=Workload(prompts=[]), device="cpu", seed=3, cache_folder=""
    )
    model = awq_model.load_awq_model(job).model
    found = {}

    def look(name):
        def hook(module, given):
            columns = (given[0][0].abs() >= 6).any(0).nonzero().flatten().tolist()
            found[name] = columns if given[0].isfinite().all() else None
        return hook

    for name, module in model.named_modules():
        if isinstance(module, gemm.WQLinear_GEMM):
            module.register_forward_pre_hook(look(name))
    with torch.inference_mode(), awq_model.runnable_on("cpu"):
        logits = model(torch.arange(32)[None]).logits
    print(json.dumps({"found": found, "finite": bool(logits.isfinite().all())}))
"""


@pytest.mark.slow
def test_awqs_random_integers_have_outliers_too() -> None:
    argv = [sys.executable, "-P", "-c", textwrap.dedent(AWQ)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["finite"]
    assert len(printed["found"]) == 28
    channels = list(outlier_channels(6, 256, seed=3))
    for name, columns in printed["found"].items():
        assert columns == (channels if name.endswith(READERS) else []), name


@pytest.mark.slow
def test_a_run_with_outliers_records_them_and_warns(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Why?\n")
    model = ["--model", "random:qwen2.5-0.5b", "--outliers", "6", "--device", "cpu"]
    small = ["--prompts", "prompts.txt", "--prompt-tokens", "4", "--new-tokens", "2", "--warmup", "0"]
    argv = command("orchestrate", "-p", "int8", *model, *small, "--out", "run")
    done = run(argv, tmp_path, environment(cache))
    assert done.returncode == 0, done.stderr
    assert PLANTED_OUTLIERS_WARNING.format(6) in done.stdout
    assert "no outliers" not in done.stdout
    measured = read_run(tmp_path / "run")
    (cell,) = measured.cells
    assert cell.job
    assert cell.job.model.outliers == measured.plan.options.outliers == 6


@pytest.mark.parametrize(
    ("arguments", "value", "bound"),
    [
        (["--outliers", "6"], "6", "--model"),
        (["--outliers", "6", "--model", "."], "6", "--model"),
        (["--outliers", "129", "--model", "random:qwen2.5-0.5b"], "129", "<= 128"),
        (["--outliers", "-1", "--model", "random:qwen2.5-0.5b"], "-1", ">= 0"),
    ],
)
def test_outliers_in_other_models_are_refused(
    arguments: list[str], value: str, bound: str, tmp_path: Path, cache: Path
) -> None:
    for script in (["orchestrate", "-p", "int8"], ["worker", "int8"]):
        done = run(command(*script, *arguments), tmp_path, environment(cache))
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert f"--outliers {value}" in line
        assert bound in line
