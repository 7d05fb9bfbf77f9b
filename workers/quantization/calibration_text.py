"""The text that weights are calibrated with, cut into samples of equal length, and the note that records it.

Calibration results are cached by content, so a different text gives a different result. Imports nothing
heavy: a worker checks whether its weights are prepared before it imports torch.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from schemas.frames import Calibration
from schemas.job import Job

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCK_TOKENS = 128
"""Tokens per sample."""
MIN_SAMPLES = 8
MAX_SAMPLES = 128
"""As in AutoAWQ, which keeps the layer inputs of all samples in memory at once."""
OWN_TEXT = Path(__file__).parent / "texts" / "calibration.txt"
NOTE = "calibration.json"


def text_path(job: Job) -> Path:
    return OWN_TEXT if job.calibration is None else Path(job.calibration.path)


def text_name(job: Job) -> str:
    return f"qbench's {OWN_TEXT.name}" if job.calibration is None else text_path(job).name


def text_sha256(job: Job) -> str:
    """Hash that results are cached by. A user's text has it in the job, since the file may be gone."""
    if job.calibration is not None:
        return job.calibration.sha256
    return hashlib.sha256(OWN_TEXT.read_bytes()).hexdigest()


def samples(job: Job, tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Token ids of the text in blocks of `BLOCK_TOKENS`, without a shorter remainder.

    A long text gives `MAX_SAMPLES` blocks, spread evenly over it. Raises `ValueError` if the text gives fewer
    than `MIN_SAMPLES`, or has changed since the run was planned.
    """
    path = text_path(job)
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != text_sha256(job):
        raise ValueError(f"the calibration text {path} has changed since the run was planned")
    ids = tokenizer(content.decode()).input_ids
    blocks = [ids[end - BLOCK_TOKENS : end] for end in range(BLOCK_TOKENS, len(ids) + 1, BLOCK_TOKENS)]
    if len(blocks) < MIN_SAMPLES:
        raise ValueError(
            f"the calibration text {path} gives {len(blocks)} samples of {BLOCK_TOKENS} tokens, "
            f"fewer than {MIN_SAMPLES}"
        )
    count = min(len(blocks), MAX_SAMPLES)
    return [blocks[index * len(blocks) // count] for index in range(count)]


def calibrated_with(job: Job, blocks: int, group_size: int, took_s: float) -> Calibration:
    """The note on weights calibrated with this many samples of this job's text."""
    return Calibration(
        text=text_name(job),
        text_sha256=text_sha256(job),
        samples=blocks,
        sample_tokens=BLOCK_TOKENS,
        group_size=group_size,
        took_s=took_s,
    )


def write_note(folder: Path, note: Calibration) -> None:
    """Save the note next to the weights it describes."""
    (folder / NOTE).write_bytes(msgspec.json.format(msgspec.json.encode(note)))


def read_note(folder: Path) -> Calibration:
    return msgspec.json.decode((folder / NOTE).read_bytes(), type=Calibration)
