"""Packages of the parent that an environment reuses, torch above all.

torch with CUDA is several GB. If the parent's torch meets a worker's header, a second one would cost them
again, and make another build part of the comparison. uv doesn't see packages outside of the environment
that it installs into (uv#7358, uv#4466). So when it resolves, it is offered each of the parent's as a wheel
without modules, to be preferred. Those that it picks are not installed: a `.pth` file appends the parent's
site-packages to the environment's path. So all of the parent's packages can be imported there, but the
environment's own come first. (`--system-site-packages` would not do: if the parent runs in a virtual
environment, it stands for the packages of the system, not for the parent's.)
"""

import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import VERSION_PATTERN, Version

_VERSION = re.compile(VERSION_PATTERN, re.VERBOSE | re.IGNORECASE)

WHEEL = "Wheel-Version: 1.0\nGenerator: qbench\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def pth_lines() -> str:
    """Lines of a `.pth` file for each folder of the parent's path that has packages, in that order."""
    folders = dict.fromkeys(str(found.locate_file("")) for found in metadata.distributions())
    # Not the bare path, so that `.pth` files in there count as well, such as those of editable installs.
    return "".join(f"import site; site.addsitedir({str(Path(each).absolute())!r})\n" for each in folders)


def write_wheels(installed: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Write the parent's `installed` packages as wheels without modules; name → version of those it could."""
    folder.mkdir()
    written: dict[str, str] = {}
    for name, version in installed.items():
        text = metadata.distribution(name).read_text("METADATA")
        if text is None or not _VERSION.fullmatch(version):  # a package of the operating system's, say
            continue
        written[name] = version
        stem = f"{name.replace('-', '_')}-{Version(version)}"
        with ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
            for file, content in {"METADATA": text, "WHEEL": WHEEL, "RECORD": ""}.items():
                wheel.writestr(f"{stem}.dist-info/{file}", content)
    return written


def split_lock(lock: str, installed: Mapping[str, str]) -> tuple[str, list[str]]:
    """The lines of a lock still to install, and its packages that are `installed`, as `name==version`."""
    missing, reused = "", []
    for line in re.sub(r"(?m)(^|\s)#.*", "", lock.replace("\\\n", " ")).splitlines():
        if name := _met_by(line, installed):
            reused.append(f"{name}=={installed[name]}")
        elif line.strip():
            missing += f"{' '.join(line.split())}\n"
    return missing, reused


def _met_by(line: str, installed: Mapping[str, str]) -> str | None:
    """The installed package that meets this line of a lock, which may be an option or empty."""
    try:
        need = Requirement(line.partition(" --")[0])
    except InvalidRequirement:
        return None
    name = canonicalize_name(need.name)
    if need.url or name not in installed:
        return None
    return name if need.specifier.contains(installed[name], prereleases=True) else None
