"""Converts a GGUF file to a folder that every precision can load.

A GGUF contains a model's weights, quantized in llama.cpp's block formats, its config and its tokenizer. The
precisions measured here start from FP16, so the file is dequantized once and cached as safetensors with its
tokenizer; after that it loads in a second. The weights keep the rounding of the GGUF's format, so the quality
of every precision should be compared with this FP16 and not with the original model.
"""

import hashlib
import shutil
import struct
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HASH_FILE = "SOURCE_SHA256"

END_OF_TURN = "<|im_end|>"


def converted_folder(path: Path, cache_folder: Path) -> Path:
    """Folder of this GGUF's FP16 form in the cache, named by the file's content."""
    return cache_folder / "gguf" / f"{_sha256(path)[:16]}-fp16"


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the model in `path` to `folder`: FP16 safetensors, config, tokenizer, and the GGUF's SHA-256.

    Does nothing if `folder` exists; an interrupted conversion leaves no folder. Raises ValueError with a
    one-line message if the file can't be read as a GGUF model.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(mkdtemp(prefix="convert-", dir=folder.parent))
    try:
        _write_model(path, scratch)
        (scratch / HASH_FILE).write_text(_sha256(path) + "\n")
        _publish(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_model(path: Path, folder: Path) -> None:
    model, tokenizer = _read_gguf(path)
    _repair_special_tokens(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _read_gguf(path: Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Passed as folder and file name, so that nothing is looked up on the Hub.
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    # A model in GGUF blocks can't be saved.
    blocks = GgufConfig(dequantize=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float16, quantization_config=blocks
        )
    except (ValueError, KeyError, IndexError, NotImplementedError, OSError, struct.error) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} can't be read as a GGUF model: {reason}") from error
    return model, tokenizer


def _repair_special_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Set the end-of-text and padding tokens, which conversion gets wrong or omits.

    ChatML models end a turn with <|im_end|>, but their GGUF may name the token that starts one; then a model
    would never stop, and a batch of prompts could not be padded.
    """
    if END_OF_TURN in tokenizer.get_vocab() and END_OF_TURN in (tokenizer.chat_template or ""):
        tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id


def _publish(scratch: Path, folder: Path) -> None:
    try:
        scratch.rename(folder)
    except OSError:
        # Another worker may have converted the same file in the meantime; its folder is equivalent.
        if not folder.exists():
            raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
