"""What weights are calibrated with: a text, cut into samples of equal length, and the note that tells of it.

Results of calibration are kept by content, so another text makes another result. Nothing heavy is imported: a
worker asks whether its weights are prepared before it imports torch.
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
"""Length of a sample."""
FEWEST_SAMPLES = 8
MOST_SAMPLES = 128
"""What AutoAWQ takes of any text; its layers' inputs are all held in memory at once."""
OWN_TEXT = Path(__file__).parent / "texts" / "calibration.txt"
NOTE = "calibration.json"


def text_path(job: Job) -> Path:
    return OWN_TEXT if job.calibration is None else Path(job.calibration.path)


def text_name(job: Job) -> str:
    return f"qbench's {OWN_TEXT.name}" if job.calibration is None else text_path(job).name


def text_sha256(job: Job) -> str:
    """What results are kept by. Of a user's text it is in the job, so that the file may be gone by then."""
    if job.calibration is not None:
        return job.calibration.sha256
    return hashlib.sha256(OWN_TEXT.read_bytes()).hexdigest()


def samples(job: Job, tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Token ids of the text in blocks of `BLOCK_TOKENS`, a shorter rest left out.

    Of a long text these are `MOST_SAMPLES` blocks, spread evenly over it. Raises `ValueError` for one that
    gives fewer than `FEWEST_SAMPLES`, or that is no longer the one that the run was laid out for.
    """
    path = text_path(job)
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != text_sha256(job):
        raise ValueError(f"the calibration text {path} was changed meanwhile")
    ids = tokenizer(content.decode()).input_ids
    blocks = [ids[end - BLOCK_TOKENS : end] for end in range(BLOCK_TOKENS, len(ids) + 1, BLOCK_TOKENS)]
    if len(blocks) < FEWEST_SAMPLES:
        raise ValueError(
            f"the calibration text {path} gives {len(blocks)} samples of {BLOCK_TOKENS} tokens, "
            f"fewer than {FEWEST_SAMPLES}"
        )
    taken = min(len(blocks), MOST_SAMPLES)
    return [blocks[index * len(blocks) // taken] for index in range(taken)]


def calibrated_with(job: Job, blocks: int, group_size: int, took_s: float) -> Calibration:
    """The note on weights that were made from so many samples of this job's text."""
    return Calibration(
        text=text_name(job),
        text_sha256=text_sha256(job),
        samples=blocks,
        sample_tokens=BLOCK_TOKENS,
        group_size=group_size,
        took_s=took_s,
    )


def write_note(folder: Path, note: Calibration) -> None:
    """Lay the note beside the weights it is about."""
    (folder / NOTE).write_bytes(msgspec.json.format(msgspec.json.encode(note)))


def read_note(folder: Path) -> Calibration:
    return msgspec.json.decode((folder / NOTE).read_bytes(), type=Calibration)
