"""Lock files: exact versions, each with the SHA-256 of what may be installed as it, as pip and uv read them.

A worker may come with one, `locks/NAME.txt` beside it, made by `uv pip compile --generate-hashes`, by
pip-compile, or taken from the cache, where `--make-env` keeps the one that it made.
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from orchestrator.errors import QbenchError
from orchestrator.precisions.borrowing import Borrowed
from orchestrator.precisions.catalog import Precision


class BadLock(QbenchError):
    """A lock file can't be used or made; the text names the file or the package."""


class _Archive(msgspec.Struct):
    hashes: dict[str, str] = {}
    hash: str = ""
    """What pip before 23.1 writes instead, e.g. Debian 12's: `sha256=…`."""

    @property
    def sha256(self) -> str | None:
        kind, _, digest = self.hash.partition("=")
        return self.hashes.get("sha256") or (digest if kind == "sha256" else None)


class _Download(msgspec.Struct):
    url: str
    archive_info: _Archive = msgspec.field(default_factory=_Archive)


class _Metadata(msgspec.Struct):
    name: str
    version: str


class _Package(msgspec.Struct):
    metadata: _Metadata
    download_info: _Download
    is_direct: bool = False
    """Named by its address, not by its version."""


class _Report(msgspec.Struct):
    """What pip's `--report` writes, as far as we need it."""

    install: list[_Package]


def lock_of_report(report: bytes) -> str:
    """A lock of all that pip reports it would install."""
    packages = msgspec.json.decode(report, type=_Report).install
    return "".join(sorted(_pin(package) for package in packages))


def _pin(package: _Package) -> str:
    name, version = package.metadata.name, package.metadata.version
    sha256 = package.download_info.archive_info.sha256
    if sha256 is None:
        raise BadLock(f"{name} {version}: {package.download_info.url} is no archive, so it has no hash")
    what = f"{name} @ {package.download_info.url}" if package.is_direct else f"{name}=={version}"
    return f"{what} --hash=sha256:{sha256}\n"


def lock_beside(precision: Precision) -> Path:
    """Where a worker's own lock lies, if it came with one."""
    return precision.path.parent / "locks" / f"{precision.name}.txt"


def read_lock_beside(precision: Precision) -> str | None:
    """Text of the lock that came with a worker. Raises `BadLock`."""
    path = lock_beside(precision)
    if not path.exists():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        list(pinned(text))
    except (OSError, UnicodeDecodeError, InvalidRequirement) as error:
        problem = str(error).partition("\n")[0]
        raise BadLock(f"{path}: can't be read as a lock: {problem}") from None
    return text


def pinned(lock: str) -> Iterator[Requirement]:
    """The versions of a lock as requirements."""
    yield from (_requirement(line) for line in _lines(lock) if not _is_option(line))


def without_borrowed(lock: str, borrowed: Borrowed) -> str:
    """A lock less what an environment has already, since it is borrowed in the very version."""
    kept = (line for line in _lines(lock) if _is_option(line) or not _is_met(_requirement(line), borrowed))
    return "".join(f"{line}\n" for line in kept)


def _is_met(need: Requirement, borrowed: Borrowed) -> bool:
    found = borrowed.get(canonicalize_name(need.name))
    return found is not None and need.specifier.contains(found.version, prereleases=True)


def _lines(lock: str) -> Iterator[str]:
    """One line for each package or option, without comments."""
    for line in lock.replace("\\\n", " ").splitlines():
        if text := f" {line.strip()}".partition(" #")[0].strip():
            yield text


def _is_option(line: str) -> bool:
    return line.startswith("-")


def _requirement(line: str) -> Requirement:
    return Requirement(line.partition(" --")[0])
