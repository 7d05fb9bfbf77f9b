"""Fixtures that many tests share: small models, a cache, and the commands as a user runs them."""

import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from commands import command, environment, run
from fake_nvml import fake_nvml_fixture  # noqa: F401
from golden_text import golden  # noqa: F401
from hypothesis import HealthCheck, settings
from worker_runs import ask  # noqa: F401

# Hypothesis must not fail a test because a busy machine draws examples slowly.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--renew", action="store_true", help="rewrite the golden texts instead of comparing")


ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 512
END = "<|end|>"

Qbench = Callable[..., subprocess.CompletedProcess[str]]


def build_tiny_model(
    folder: Path, architecture: str, hidden_size: int = 128, intermediate_size: int = 256
) -> Path:
    """A random two-layer model and its tokenizer, saved like a user's local folder.

    The default widths are the smallest that AutoAWQ's search accepts: inputs in groups of 64, outputs
    divisible by 64.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE tokenizer on the calibration text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = (ROOT / "workers/quantization/texts/calibration.txt").read_text()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([text], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny-qwen2", "qwen2")


@pytest.fixture(scope="session")
def lively(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with larger weights, so that its answers depend on the whole prompt.

    With its initial weights it only repeats the prompt's last token.
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
    """A cache folder shared by all tests, so that weights are prepared once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def qbench(tmp_path: Path, cache: Path) -> Qbench:
    """Run a console script in an empty folder: `qbench("orchestrate", "-p", "fp16")`."""

    def run_script(
        script: str, *arguments: str | Path, env: Mapping[str, str] = {}
    ) -> subprocess.CompletedProcess[str]:
        return run(command(script, *arguments), tmp_path, environment(cache, **env), timeout_s=600)

    return run_script
