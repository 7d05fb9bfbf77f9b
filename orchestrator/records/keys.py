"""The identity of a cell: one key, and everything that is derived from it.

A cell is one precision in one decode mode on one workload, in one round. `key_of` gives the key of a job and
of its record alike. Which cells share a row, a baseline or a file follows from the key's properties.
"""

from collections.abc import Iterable
from typing import NamedTuple

from schemas.job import DecodeMode, Job, Workload
from schemas.record import CellRecord

BASELINE = "fp16"
"""The precision that all others are compared with."""


class WorkloadKey(NamedTuple):
    """The size of a workload. Only precisions and decode modes on the same one are compared."""

    prompt_tokens: int | None = None
    depth: int = 0
    batch_size: int = 1
    new_tokens: int = 0


NO_WORKLOAD = WorkloadKey()
"""The workload of a cell skipped before it had a job; every other cell generates at least one token."""


class CellKey(NamedTuple):
    """The identity of a cell within its run: no two cells of a run have the same key."""

    precision: str
    decode: DecodeMode = "eager"
    workload: WorkloadKey = NO_WORKLOAD
    round: int = 0
    aa_control: bool = False

    @property
    def variant(self) -> tuple[str, DecodeMode]:
        """A precision in a decode mode, on any workload."""
        return self.precision, self.decode

    @property
    def name(self) -> str:
        """For display, e.g. `fp16 graph`; eager decode, the default, is not mentioned."""
        decode = "" if self.decode == "eager" else f" {self.decode}"
        return f"{self.precision}{decode}{' (A/A)' if self.aa_control else ''}"

    @property
    def without_round(self) -> "CellKey":
        """Shared by the cells of all rounds: the key of a row."""
        return self._replace(round=0)

    @property
    def is_baseline(self) -> bool:
        """Whether other cells are compared with this one; the A/A control is itself compared."""
        return self.precision == BASELINE and not self.aa_control

    @property
    def baseline(self) -> "CellKey":
        """The cell to compare this one with: same decode mode, workload and round."""
        return self._replace(precision=BASELINE, aa_control=False)

    @property
    def stem(self) -> str:
        """A file name that is unique within the run, e.g. `fp16-graph-b8-p512-d4096-n64-r3`."""
        return self._stem(f"-n{self.workload.new_tokens}")

    @property
    def older_stems(self) -> tuple[str, str]:
        """Its file names in older runs, newest first: with one count of new tokens, with one decode mode."""
        return self._stem(""), self.precision

    def _stem(self, new: str) -> str:
        load = self.workload
        batch = f"-b{load.batch_size}" if load.batch_size > 1 else ""
        prompt = "" if load.prompt_tokens is None else f"-p{load.prompt_tokens}"
        depth = f"-d{load.depth}" if load.depth else ""
        round_ = f"-r{self.round}" if self.round else ""
        control = "-aa" if self.aa_control else ""
        return f"{self.precision}-{self.decode}{batch}{prompt}{depth}{new}{round_}{control}"


def key_of(cell: Job | CellRecord) -> CellKey:
    """The key of a cell, measured or yet to be measured."""
    job = cell if isinstance(cell, Job) else cell.job
    if job is None:
        return CellKey(cell.precision)
    return CellKey(job.precision, job.workload.decode, _workload(job.workload), job.round, job.aa_control)


def _workload(load: Workload) -> WorkloadKey:
    return WorkloadKey(load.prompt_tokens, load.depth, load.batch_size, load.new_tokens)


def by_workload(cells: Iterable[CellRecord]) -> dict[WorkloadKey, list[CellRecord]]:
    """The cells of each workload, in order of first appearance, without those that never had a job."""
    groups: dict[WorkloadKey, list[CellRecord]] = {}
    for cell in cells:
        groups.setdefault(key_of(cell).workload, []).append(cell)
    groups.pop(NO_WORKLOAD, None)
    return groups
