"""What an environment of its own borrows from the parent's: packages that fit, by links.

torch with CUDA is several GB. Where the parent's torch meets a worker's header, a second one would cost them
again, and make another build part of what is compared. So of all that an environment needs, whatever the
parent has in a version that fits is linked into a folder, which the environment looks into after its own
packages. It sees that much of the parent's and no more: the parent's whole site-packages on its path would
let a library find, and use, what no header named. (`--system-site-packages` would not do: where the parent
runs in a virtual environment itself, the system's packages are not the parent's.)
"""

from collections import deque
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

import msgspec
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

Borrowed = Mapping[str, metadata.Distribution]
"""Canonical name → the parent's distribution."""


class _Source(msgspec.Struct):
    editable: bool = False


class _DirectUrl(msgspec.Struct):
    dir_info: _Source = msgspec.field(default_factory=_Source)


def find_borrowable(requirements: Iterable[Requirement]) -> Borrowed:
    """Those of the parent's packages that meet `requirements`, with those that they need in turn."""
    found: dict[str, metadata.Distribution] = {}
    followed: set[tuple[str, str]] = set()
    wanted = deque((need, "") for need in requirements)
    while wanted:
        need, extra = wanted.popleft()
        if need.marker and not need.marker.evaluate({"extra": extra}):
            continue
        distribution = _own_distribution(need)
        if distribution is None:
            continue
        name = canonicalize_name(need.name)
        found[name] = distribution
        for one in {(name, each) for each in ("", *need.extras)} - followed:
            followed.add(one)
            wanted.extend((Requirement(line), one[1]) for line in distribution.requires or [])
    return found


def link_borrowed(borrowed: Borrowed, folder: Path) -> None:
    """Make `folder`, and link into it every module and the metadata of what is borrowed."""
    folder.mkdir()
    for distribution in borrowed.values():
        for name in _top_names(distribution):
            link = folder / name
            if not link.is_symlink():  # several may share a folder, as NVIDIA's packages do
                link.symlink_to(Path(str(distribution.locate_file(name))).absolute())


def _own_distribution(need: Requirement) -> metadata.Distribution | None:
    """The parent's distribution that meets `need`, if it can be linked: it has to know its files."""
    try:
        distribution = metadata.distribution(need.name)
    except metadata.PackageNotFoundError:
        return None
    version: str | None = distribution.version  # a half-removed package has none
    if version is None or need.url or not need.specifier.contains(version, prereleases=True):
        return None
    if distribution.read_text("RECORD") is None or _is_editable(distribution):
        return None
    return distribution


def _is_editable(distribution: metadata.Distribution) -> bool:
    text = distribution.read_text("direct_url.json")
    return text is not None and msgspec.json.decode(text, type=_DirectUrl).dir_info.editable


def _top_names(distribution: metadata.Distribution) -> set[str]:
    """What it put into site-packages; its scripts and the like lie elsewhere."""
    return {file.parts[0] for file in distribution.files or []} - {"..", "/", "__pycache__"}
