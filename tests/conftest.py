"""What many tests need: a model small enough to build on the spot, and the commands as a user has them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_nvml import fake_nvml_fixture  # noqa: F401
from golden_text import golden  # noqa: F401
from hypothesis import HealthCheck, settings
from worker_runs import ask  # noqa: F401

# A loaded machine draws examples slowly, which is no fault of the tests.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--renew", action="store_true", help="write the golden texts anew instead of comparing")


ROOT = Path(__file__).resolve().parent.parent

Qbench = Callable[..., subprocess.CompletedProcess[str]]


def build_tiny_model(
    folder: Path, architecture: str, hidden_size: int = 128, intermediate_size: int = 256
) -> Path:
    """A random two-layer model with a tokenizer of its own, saved as a user's local folder would be.

    Its usual widths are the smallest that AutoAWQ's search accepts: inputs in groups of 64, outputs by 64.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    text = (ROOT / "workers/quantization/texts/calibration.txt").read_text()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([text], trainer)
    config = AutoConfig.for_model(
        architecture,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny-qwen2", "qwen2")


@pytest.fixture(scope="session")
def lively(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with weights large enough that what it says depends on all that it was told.

    As it is made, it repeats the last token of its prompt whatever came before.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models") / "lively"
    shutil.copytree(tiny_llama, folder)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, tie_word_embeddings=False)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3)
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of the tests' own, shared so that weights are prepared once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def qbench(tmp_path: Path, cache: Path) -> Qbench:
    """Run a console script in an empty folder: `qbench("orchestrate", "-p", "fp16")`."""

    def run(script: str, *arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "QBENCH_CACHE": str(cache), **options.pop("env", {})}  # type: ignore[dict-item]
        command = [str(Path(sys.executable).with_name(f"qbench-{script}")), *map(str, arguments)]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, **options
        )  # type: ignore[call-overload]

    return run
