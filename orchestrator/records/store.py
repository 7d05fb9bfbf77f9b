"""A run on disk: the only module that reads or writes run folders.

    RUN/plan.json           what was asked for
    RUN/environment.json    the machine
    RUN/peaks.json          what the device reached, where that was measured
    RUN/records.jsonl       one CellRecord a line, appended and fsynced when its cell ends
    RUN/samples/NAME.jsonl  the samples of one cell
    RUN/logs/NAME.log       the stderr of one worker

A run that is killed keeps every finished cell; a line torn by the kill is passed over when read. Other files
are whole or absent, and `plan.json` is written after `environment.json`: with it a run can be gone on with.

Runs are also compared by their records alone, brought from another machine, which is then unknown.
"""

import fcntl
import gzip
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from orchestrator.errors import BadInput
from orchestrator.records.names import file_stem, older_file_stem
from schemas.environment import Environment
from schemas.job import Job
from schemas.options import Options
from schemas.record import CellRecord, MemoryReading, PeaksRecord, Run, RunPlan

RECORDS = "records.jsonl"
ARCHIVED_RECORDS = f"{RECORDS}.gz"
"""Records and samples are always written plain, but read gzipped too: that is how runs are archived."""
UNKNOWN = "unknown"
T = TypeVar("T")
SAMPLES = msgspec.json.Decoder(MemoryReading)

RUNS_FOLDER = Path("qbench-runs")
"""Where runs lie that were not told to lie elsewhere, from the folder on that they were started in."""


class RunFolder:
    """A run folder being written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, plan: RunPlan, environment: Environment) -> "RunFolder":
        """Make the folder and write what is known before the first cell. Raises `BadInput` if it is taken."""
        if (path / "plan.json").exists():
            raise BadInput("--out", str(path), "holds a run already", "Name a new folder")
        try:
            for folder in ("logs", "samples"):
                (path / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(
                "--out", str(path), f"can't be made: {error.strerror}", "Name another folder"
            ) from error
        _write(path / "environment.json", msgspec.json.format(msgspec.json.encode(environment)))
        _write(path / "plan.json", msgspec.json.format(msgspec.json.encode(plan)))
        return cls(path)

    @classmethod
    def reopen(cls, path: Path) -> "RunFolder":
        """A run folder to continue. Raises `BadInput` if its records are gzipped: none can be appended."""
        if (path / ARCHIVED_RECORDS).exists():
            raise BadInput(
                "--resume",
                str(path),
                "holds gzipped records",
                f"Gunzip {ARCHIVED_RECORDS} first",
            )
        return cls(path)

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Keep others from writing to the folder meanwhile; the kernel ends that with this process."""
        if not os.access(self.path / "plan.json", os.W_OK):
            raise BadInput("--resume", str(self.path), "can't be written to", "Resume a copy of it")
        with (self.path / "plan.json").open("r+b") as file:  # over NFS what is only read can't be locked
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                problem = "another process is measuring this run"
                raise BadInput("--resume", str(self.path), problem, "Wait for that to end") from None
            yield

    def mend(self, left: Iterable[Job]) -> None:
        """Take away what a kill left half done: a torn last line, and samples of cells that are `left`."""
        records = self.path / RECORDS
        if records.exists():
            os.truncate(records, len(_whole(records.read_bytes())))
        for job in left:
            (self.path / "samples" / f"{file_stem(job)}.jsonl").unlink(missing_ok=True)

    def new_log(self, name: str) -> Path:
        """Where a worker's stderr goes; a second worker of the same name gets a file of its own."""
        logs = self.path / "logs"
        taken = len([*logs.glob(f"{name}.log"), *logs.glob(f"{name}.*.log")])
        return logs / (f"{name}.{taken + 1}.log" if taken else f"{name}.log")

    def keep_peaks(self, record: PeaksRecord) -> None:
        """Keep what the device reached, or why that is not known."""
        _write(self.path / "peaks.json", msgspec.json.format(msgspec.json.encode(record)))

    def append(self, record: CellRecord) -> None:
        """Keep a finished cell: its samples first, so that a record never lacks them."""
        samples = b"".join(msgspec.json.encode(sample) + b"\n" for sample in record.samples)
        _write(_samples_file(self.path, record), samples)
        line = msgspec.json.encode(msgspec.structs.replace(record, samples=[])) + b"\n"
        with (self.path / RECORDS).open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def read_run(path: Path, samples: bool = True) -> Run:
    """Read a run folder back. Raises `BadInput` where there is none, or it is not one of ours."""
    with _bad_input(path):
        return _read_folder(path, samples)


def read_records(path: Path, samples: bool = True) -> Run:
    """The same of a run folder, of the `records.jsonl` in it, or of any file of records by itself.

    Without the `samples`, most of the bytes, it takes a fraction of the time.
    """
    with _bad_input(path):
        return _read_file(path, samples) if path.is_file() else _read_folder(path, samples)


@contextmanager
def _bad_input(path: Path) -> Iterator[None]:
    try:
        yield
    except (msgspec.MsgspecError, UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadInput(
            "RUN", str(path), f"can't be read: {error}", "Read it with the version that wrote it"
        ) from error
    except OSError as error:
        raise BadInput(
            "RUN",
            str(path),
            f"is no run folder: no {error.filename}",
            "Name a folder that qbench-orchestrate wrote",
        ) from error


def _read_folder(path: Path, samples: bool) -> Run:
    plan = _read(path / "plan.json", RunPlan)
    environment = _read(path / "environment.json", Environment)
    records = _stored(path / RECORDS)
    cells = _read_cells(records) if records else []
    if samples:
        cells = [msgspec.structs.replace(cell, samples=_read_samples(path, cell)) for cell in cells]
    peaks = _read(path / "peaks.json", PeaksRecord) if (path / "peaks.json").exists() else None
    return Run(plan=plan, environment=environment, cells=cells, peaks=peaks)


def read_runs(folder: Path) -> Iterator[Run]:
    """The runs in a folder from old to new, by their names; what can't be read is passed over."""
    for path in sorted(folder.glob("*/plan.json")):
        with suppress(BadInput):
            yield read_run(path.parent)


def find_records(folder: Path) -> list[Path]:
    """The file of records of every run below a folder."""
    found = {file.parent: file for name in (ARCHIVED_RECORDS, RECORDS) for file in folder.rglob(name)}
    return [found[path] for path in sorted(found)]


def _read_file(file: Path, samples: bool) -> Run:
    """The folder where its records were named; else what they tell by themselves."""
    beside = [file.parent / name for name in ("plan.json", "environment.json")]
    if file.name in (RECORDS, ARCHIVED_RECORDS) and all(each.exists() for each in beside):
        return _read_folder(file.parent, samples)
    cells = _read_cells(file)
    if not cells:
        raise BadInput(
            "RUN", str(file), "is no run folder and holds no records", f"Name a folder, or its {RECORDS}"
        )
    jobs = [cell.job for cell in cells if cell.job is not None]
    plan = RunPlan(command=[], options=Options(), jobs=jobs, skipped={})
    return Run(plan=plan, environment=_unknown_machine(), cells=cells)


def _unknown_machine() -> Environment:
    return Environment(
        qbench=UNKNOWN,
        commit=None,
        python=UNKNOWN,
        platform=UNKNOWN,
        cpu=UNKNOWN,
        cpu_count=None,
        memory_bytes=None,
        gpus=[],
        gpu_reason="the records lie without their environment.json",
    )


def _read_cells(file: Path) -> list[CellRecord]:
    return msgspec.json.Decoder(CellRecord).decode_lines(_whole(_content(file)))


def _whole(lines: bytes) -> bytes:
    """Without what a kill left of the last: only what ends in a newline was written whole."""
    return lines[: lines.rfind(b"\n") + 1]


def _read_samples(path: Path, cell: CellRecord) -> list[MemoryReading]:
    file = _samples_file(path, cell)
    older = file if cell.job is None else file.with_name(f"{older_file_stem(cell.job)}.jsonl")
    oldest = file.with_name(f"{cell.precision}.jsonl")  # from before cells had decode modes
    stored = _stored(file, older, oldest)
    return SAMPLES.decode_lines(_content(stored)) if stored else []


def _samples_file(path: Path, cell: CellRecord) -> Path:
    return path / "samples" / f"{cell.precision if cell.job is None else file_stem(cell.job)}.jsonl"


def _stored(*files: Path) -> Path | None:
    """The first of these files that exists, plain or gzipped."""
    forms = (form for file in files for form in (file, file.with_name(f"{file.name}.gz")))
    return next((form for form in forms if form.exists()), None)


def _content(file: Path) -> bytes:
    return gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()


def _read(file: Path, kind: type[T]) -> T:
    return msgspec.json.decode(file.read_bytes(), type=kind)


def _write(file: Path, data: bytes) -> None:
    """Write a file that is there as a whole or not at all, whenever we are killed."""
    draft = file.with_name(f"{file.name}.draft")
    with draft.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    draft.replace(file)
