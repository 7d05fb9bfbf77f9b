"""A run on disk: the only module that reads or writes run folders.

    RUN/plan.json           the request: options and jobs
    RUN/environment.json    the machine
    RUN/peaks.json          the device's measured peaks, if they were measured
    RUN/records.jsonl       one CellRecord per line, appended and fsynced when its cell ends
    RUN/samples/NAME.jsonl  the samples of one cell
    RUN/logs/NAME.log       the stderr of one worker

A run that is killed keeps every finished cell; readers ignore a line that the kill truncated. The other files
are complete or absent. `plan.json` is written after `environment.json`, so a run that has it can be resumed.

Records copied from another machine without their folder can still be compared; the machine is then unknown.

Records and samples are written plain, and also read gzipped (`records.jsonl.gz`): runs are archived that way.
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
from orchestrator.records.keys import key_of
from schemas.environment import Environment
from schemas.job import Job
from schemas.options import Options
from schemas.record import CellRecord, MemoryReading, PeaksRecord, Run, RunPlan

RECORDS = "records.jsonl"
ARCHIVED_RECORDS = f"{RECORDS}.gz"
UNKNOWN = "unknown"
T = TypeVar("T")
SAMPLES = msgspec.json.Decoder(MemoryReading)

RUNS_FOLDER = Path("qbench-runs")
"""Where runs are written by default, relative to the working directory."""


class RunFolder:
    """A run folder being written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, plan: RunPlan, environment: Environment) -> "RunFolder":
        """Create the folder, with the plan and the machine. Raises `BadInput` if it already holds a run."""
        if (path / "plan.json").exists():
            raise BadInput("--out", str(path), "already holds a run", "Name a new folder")
        try:
            for folder in ("logs", "samples"):
                (path / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(
                "--out", str(path), f"can't be created: {error.strerror}", "Name another folder"
            ) from error
        _write(path / "environment.json", msgspec.json.format(msgspec.json.encode(environment)))
        _write(path / "plan.json", msgspec.json.format(msgspec.json.encode(plan)))
        return cls(path)

    @classmethod
    def reopen(cls, path: Path) -> "RunFolder":
        """A run folder to resume. Raises `BadInput` if its records are gzipped: none can be appended."""
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
        """Hold an exclusive lock on the folder; the kernel releases it if this process dies."""
        if not os.access(self.path / "plan.json", os.W_OK):
            raise BadInput("--resume", str(self.path), "is read-only", "Resume a copy of it")
        # Opened for writing, since NFS refuses an exclusive lock otherwise.
        with (self.path / "plan.json").open("r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                problem = "another process is measuring this run"
                raise BadInput("--resume", str(self.path), problem, "Wait for it to finish") from None
            yield

    def repair(self, finished: int, left: Iterable[Job]) -> None:
        """Repair the traces of a kill: remove a truncated last line, and samples of cells that are `left`.

        Raises `BadInput` if the folder no longer holds exactly `finished` records: another process added some
        before the folder was reserved.
        """
        records = self.path / RECORDS
        complete = _complete_lines(records.read_bytes()) if records.exists() else b""
        if complete.count(b"\n") != finished:
            problem = "another process has resumed this run in the meantime"
            raise BadInput("--resume", str(self.path), problem, "Resume it again")
        if records.exists():
            os.truncate(records, len(complete))
        for job in left:
            (self.path / "samples" / f"{key_of(job).stem}.jsonl").unlink(missing_ok=True)

    def new_log(self, name: str) -> Path:
        """A new file for a worker's stderr, numbered if earlier workers had the same name."""
        logs = self.path / "logs"
        earlier = len([*logs.glob(f"{name}.log"), *logs.glob(f"{name}.*.log")])
        return logs / (f"{name}.{earlier + 1}.log" if earlier else f"{name}.log")

    def write_peaks(self, record: PeaksRecord) -> None:
        """Write the device's peaks, or why they are unknown."""
        _write(self.path / "peaks.json", msgspec.json.format(msgspec.json.encode(record)))

    def append(self, record: CellRecord) -> None:
        """Write a finished cell: its samples first, so that every record has them."""
        samples = b"".join(msgspec.json.encode(sample) + b"\n" for sample in record.samples)
        _write(_samples_file(self.path, record), samples)
        line = msgspec.json.encode(msgspec.structs.replace(record, samples=[])) + b"\n"
        with (self.path / RECORDS).open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def read_run(path: Path, samples: bool = True) -> Run:
    """Read a run folder. Raises `BadInput` if there is none, or if its files can't be decoded."""
    with _bad_input(path):
        return _read_folder(path, samples)


def read_records(path: Path, samples: bool = True) -> Run:
    """Read a run folder, the records in it, or a file of records without its folder.

    Without `samples`, which are most of the bytes, this takes a fraction of the time.
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
            f"not a run folder: can't open {error.filename}",
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
    """The runs in a folder by name, without samples; unreadable ones are skipped."""
    for path in sorted(folder.glob("*/plan.json")):
        with suppress(BadInput):
            yield read_run(path.parent, samples=False)


def find_records(folder: Path) -> list[Path]:
    """The file of records of every run below a folder."""
    found = {file.parent: file for name in (ARCHIVED_RECORDS, RECORDS) for file in folder.rglob(name)}
    return [found[path] for path in sorted(found)]


def _read_file(file: Path, samples: bool) -> Run:
    """The whole run if the file is its `records.jsonl`; otherwise only the contents of the records."""
    companions = [file.parent / name for name in ("plan.json", "environment.json")]
    if file.name in (RECORDS, ARCHIVED_RECORDS) and all(each.exists() for each in companions):
        return _read_folder(file.parent, samples)
    cells = _read_cells(file)
    if not cells:
        problem = "neither a run folder nor a file of records"
        raise BadInput("RUN", str(file), problem, f"Name a run folder, or its {RECORDS}")
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
        gpu_reason="the records were read without their environment.json",
    )


def _read_cells(file: Path) -> list[CellRecord]:
    return msgspec.json.Decoder(CellRecord).decode_lines(_complete_lines(_content(file)))


def _complete_lines(lines: bytes) -> bytes:
    """All but a last line without a newline, which a kill truncated."""
    return lines[: lines.rfind(b"\n") + 1]


def _read_samples(path: Path, cell: CellRecord) -> list[MemoryReading]:
    newest = _samples_file(path, cell)
    older = (newest.with_name(f"{stem}.jsonl") for stem in key_of(cell).older_stems)
    stored = _stored(newest, *older)
    return SAMPLES.decode_lines(_content(stored)) if stored else []


def _samples_file(path: Path, cell: CellRecord) -> Path:
    stem = cell.precision if cell.job is None else key_of(cell).stem
    return path / "samples" / f"{stem}.jsonl"


def _stored(*files: Path) -> Path | None:
    """The first of these files that exists, plain or gzipped."""
    forms = (form for file in files for form in (file, file.with_name(f"{file.name}.gz")))
    return next((form for form in forms if form.exists()), None)


def _content(file: Path) -> bytes:
    return gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()


def _read(file: Path, kind: type[T]) -> T:
    return msgspec.json.decode(file.read_bytes(), type=kind)


def _write(file: Path, data: bytes) -> None:
    """Write a file atomically: a kill at any time leaves it complete or absent."""
    draft = file.with_name(f"{file.name}.draft")
    with draft.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    draft.replace(file)
