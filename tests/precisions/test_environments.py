"""Environments of their own, as a user makes, uses and drops them: real pip, on an index of tiny wheels.

The wheels are made here, so that no network is needed and what is on the index can be changed.
"""

import base64
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from commands import command, environment, run

from orchestrator.records.store import read_run
from schemas.frames import Done

pytestmark = pytest.mark.slow

WORKER = '''\
# /// script
# requires-python = "{python}"
# dependencies = {needs}
# [tool.qbench]
# precision = "mine"
# label = "My own"
# bits_per_weight = 31
# devices = ["cpu", "cuda"]
# ///
"""My own: as many bits as I like."""

from schemas.job import Job
from workers.protocol.backend import Backend, LoadedModel
from workers.harness.main import main


def load(job: Job) -> LoadedModel:
    import torch

    from workers.models.transformers_model import load_transformers_model

    return load_transformers_model(job, torch.float32)


if __name__ == "__main__":
    main(Backend(load))
'''


def make_wheel(folder: Path, name: str, number: str, *needs: str) -> Path:
    """A wheel with one module, whose VERSION is its version's."""
    info = f"{name}-{number}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n"]
    files = {
        f"{name}.py": f"VERSION = {number!r}\n",
        f"{info}/METADATA": "".join([*metadata, *(f"Requires-Dist: {need}\n" for need in needs)]),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {path: hashlib.sha256(text.encode()).digest() for path, text in files.items()}
    record = [
        f"{path},sha256={base64.urlsafe_b64encode(digest).decode().rstrip('=')},\n"
        for path, digest in digests.items()
    ]
    files[f"{info}/RECORD"] = "".join([*record, f"{info}/RECORD,,\n"])
    wheel = folder / f"{name}-{number}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return wheel


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Place(NamedTuple):
    """A user's folder with one worker in it, an index of wheels, and a cache."""

    folder: Path

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def index(self) -> Path:
        return self.folder / "index"

    @property
    def home(self) -> Path:
        return self.cache / "environments/mine"

    def environment(self, **more: str) -> dict[str, str]:
        # Without uv, which a developer may have.
        path = os.pathsep.join(
            each for each in os.environ["PATH"].split(os.pathsep) if not Path(each, "uv").exists()
        )
        pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.index)}
        return environment(self.cache, **({"PATH": path} | pip | more))

    def write(self, *needs: str, python: str = ">=3.11") -> None:
        (self.folder / "workers").mkdir(exist_ok=True)
        text = WORKER.format(needs=json.dumps(needs), python=python)
        (self.folder / "workers/mine.py").write_text(text)

    def qbench(self, script: str, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        argv = command(script, "--workers", "workers", *arguments)
        return run(argv, self.folder, self.environment(**variables))

    def make(self, **variables: str) -> "subprocess.CompletedProcess[str]":
        done = self.qbench("worker", "--make-env", "mine", **variables)
        assert done.returncode == 0, done.stderr
        return done

    def interpreter(self) -> str:
        """Which Python the precision would run under."""
        options = ["-p", "mine", "--dry-run", "-m", "random:qwen2.5-0.5b", "--device", "cpu"]
        done = self.qbench("orchestrate", *options)
        assert done.returncode == 0, done.stderr
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("mine: ")]
        return line

    def ask(self, code: str) -> Any:
        """What an expression is in the environment, in a Python started as a worker's is."""
        (python,) = self.home.glob("*/venv/bin/python")
        program = f"import json, os, sys, importlib.util as u\nprint(json.dumps({code}))"
        return json.loads(subprocess.check_output([python, "-P", "-c", program], env=self.environment()))

    def left(self) -> list[str]:
        """What is in the cache of the precision's environments, but for the file that reserves it."""
        return sorted(path.name for path in self.home.iterdir() if path.name != ".lock")


def make_place(folder: Path) -> Place:
    place = Place(folder)
    place.index.mkdir()
    make_wheel(place.index, "qprobe", "1.0")
    make_wheel(place.index, "qprobe", "2.0", "qneed>=1")
    make_wheel(place.index, "qneed", "1.5")
    return place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path)


def assert_bad_input(done: "subprocess.CompletedProcess[str]", *said: str) -> None:
    """What the installer said stands above; the last line is ours, and there is no traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert all(each in last for each in said), last
    assert "Traceback" not in done.stderr


# One that was made, looked at from all sides


class Made(NamedTuple):
    place: Place
    done: "subprocess.CompletedProcess[str]"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    place = make_place(tmp_path_factory.mktemp("environments"))
    place.write("torch>=2.6", "transformers>=5.17,<6", "accelerate>=1.10", "gguf>=0.17", "qprobe")
    return Made(place, place.make())


def test_its_making_can_be_followed(made: Made) -> None:
    (folder,) = made.place.home.glob("*/")
    assert made.done.stdout == f"mine has an environment of its own: {folder}\n"
    assert f"making an environment for mine: {folder}\n" in made.done.stderr
    assert "Successfully installed qneed-1.5 qprobe-2.0" in made.done.stderr


def test_torch_is_the_parents_and_is_not_installed_again(made: Made) -> None:
    import torch

    parents = Path(torch.__file__).resolve()
    assert (
        Path(
            made.place.ask("__import__('torch').__file__ and os.path.realpath(__import__('torch').__file__)")
        )
        == parents
    )
    (site,) = made.place.home.glob("*/venv/lib/python*/site-packages")
    installed = {path.name for path in site.iterdir()} - {"__pycache__"}
    assert installed == {
        "borrowed.pth", "qprobe.py", "qprobe-2.0.dist-info", "qneed.py", "qneed-1.5.dist-info",
    }  # fmt: skip
    assert made.place.ask("__import__('torch').ones(2).sum().item()") == 2


def test_it_holds_what_the_header_asks_for_and_no_more_of_the_parents(made: Made) -> None:
    found = ["qprobe", "qneed", "msgspec", "transformers", "numpy"]
    hidden = ["pytest", "awq", "bitsandbytes", "orchestrator", "workers"]
    assert made.place.ask(f"[u.find_spec(name) is not None for name in {[*found, *hidden]}]") == (
        [True] * len(found) + [False] * len(hidden)
    )


def test_the_lock_has_the_hash_of_every_archive(made: Made) -> None:
    (lock,) = made.place.home.glob("*.txt")
    about, *pins = lock.read_text().splitlines()
    assert f"torch=={version('torch')}" in about
    index = made.place.index
    assert pins == [
        f"qneed==1.5 --hash=sha256:{sha256(index / 'qneed-1.5-py3-none-any.whl')}",
        f"qprobe==2.0 --hash=sha256:{sha256(index / 'qprobe-2.0-py3-none-any.whl')}",
    ]


def test_it_is_used_from_then_on_unless_another_python_is_named(made: Made) -> None:
    (folder,) = made.place.home.glob("*/")
    assert made.place.interpreter().endswith(f"under {folder}/venv/bin/python")
    options = ["-p", "mine", "--dry-run", "-m", "random:qwen2.5-0.5b", "--python", f"mine={sys.executable}"]
    done = made.place.qbench("orchestrate", *options)
    assert "qprobe is not installed" in done.stdout


def test_the_list_tells_who_has_one(made: Made) -> None:
    done = made.place.qbench("orchestrate", "--list")
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert rows["mine"].split()[2:5] == ["yes", "its", "own"]
    assert rows["fp32"].split()[2:4] == ["yes", "qbench's"]


def test_making_it_again_does_nothing(made: Made) -> None:
    (blueprint,) = made.place.home.glob("*/blueprint.json")
    before = blueprint.stat().st_mtime_ns
    done = made.place.make()
    assert done.stdout == made.done.stdout
    assert done.stderr == ""
    assert blueprint.stat().st_mtime_ns == before


def test_a_run_takes_each_precision_in_its_own(made: Made, tiny_llama: Path) -> None:
    folder = made.place.folder
    (folder / "prompts.txt").write_text("Why is the sky blue?\nName a river.\n")
    options = ["-p", "mine", "-p", "fp32", "-m", str(tiny_llama), "--new-tokens", "10", "--device", "cpu"]
    done = made.place.qbench("orchestrate", *options, "--prompts", "prompts.txt", "--out", "run")
    assert done.returncode == 0, done.stdout + done.stderr
    mine, fp32 = read_run(folder / "run").cells
    assert isinstance(mine.outcome, Done), mine.outcome
    assert mine.ready
    assert fp32.ready
    assert mine.ready.versions == fp32.ready.versions | {"qprobe": "2.0"}
    assert [trial.token_ids for trial in mine.trials] == [trial.token_ids for trial in fp32.trials]


# What is borrowed stays whole


def test_another_version_than_the_parents_stands_before_it_and_the_parents_stays(place: Place) -> None:
    """pytest is borrowed with all that it needs, of which the header wants one in another version."""
    make_wheel(place.index, "iniconfig", "99.0")
    place.write("pytest", "iniconfig==99.0")
    before = {str(file): Path(str(file.locate())).stat() for file in distribution("iniconfig").files or []}
    place.make()
    assert place.ask("__import__('iniconfig').VERSION") == "99.0"
    assert place.ask("u.find_spec('pytest') is not None")
    assert version("iniconfig") != "99.0"
    for file in distribution("iniconfig").files or []:
        assert Path(str(file.locate())).stat().st_mtime_ns == before[str(file)].st_mtime_ns
    place.qbench("worker", "--drop-env", "mine")
    assert all(Path(str(file.locate())).exists() for file in distribution("iniconfig").files or [])


def test_a_header_that_wants_another_torch_gets_it_and_none_of_the_parents(place: Place) -> None:
    make_wheel(place.index, "torch", "2.0")
    place.write("torch==2.0", "qprobe==1.0")
    place.make()
    assert place.ask("__import__('torch').VERSION") == "2.0"
    assert place.ask("u.find_spec('sympy') is None")


def test_one_whose_loan_is_gone_is_not_run_and_is_made_anew(place: Place) -> None:
    place.write("torch>=2.6", "qprobe==1.0")
    place.make()
    (loan,) = place.home.glob("*/borrowed/torch-*.dist-info")
    loan.unlink()
    said = place.qbench("worker", "--list").stdout
    assert (
        f"mine: needs other packages (torch is not installed): qbench-worker --workers {place.folder}" in said
    )
    place.make()
    assert place.ask("u.find_spec('torch') is not None")


# What goes wrong leaves nothing


def test_a_package_that_does_not_exist(place: Place) -> None:
    place.write("no-such-package>=1", "qprobe")
    done = place.qbench("worker", "--make-env", "mine")
    said = "its packages can't be resolved (No matching distribution found for no-such-package>=1)"
    assert_bad_input(done, f"--make-env mine: {said}. Check the dependencies in ", "workers/mine.py")
    assert place.left() == []
    assert "mine: needs other packages" in place.qbench("worker", "--list").stdout


def test_packages_that_do_not_fit_together(place: Place) -> None:
    place.write("qprobe==2.0", "qneed==1.0")
    make_wheel(place.index, "qneed", "1.0")
    make_wheel(place.index, "qprobe", "2.0", "qneed>=1.5")
    done = place.qbench("worker", "--make-env", "mine")
    assert_bad_input(done, "Cannot install qneed==1.0 and qprobe==2.0 because")
    assert place.left() == []


def test_a_python_that_is_not_there(place: Place) -> None:
    place.write("qprobe", python=">=3.99")
    assert ": qbench-worker --workers " in place.qbench("worker", "--list").stdout
    done = place.qbench("worker", "--make-env", "mine")
    assert_bad_input(done, "its header wants Python >=3.99, and there is none here")


@pytest.fixture
def silent_index() -> Iterator[str]:
    """The address of an index that takes every call and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/simple"


def descendants(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def runs(process: psutil.Process) -> bool:
    """Whether it still does; a zombie is dead, and its new parent will wait for it."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupt_leaves_nothing_that_is_taken_for_an_environment(
    place: Place, silent_index: str, number: signal.Signals
) -> None:
    place.write("qprobe==1.0")
    slow = {"PIP_NO_INDEX": "0", "PIP_INDEX_URL": silent_index, "PIP_EXTRA_INDEX_URL": "", "PIP_RETRIES": "0"}
    process = subprocess.Popen(
        command("worker", "--workers", "workers", "--make-env", "mine"),
        cwd=place.folder,
        env=place.environment(**slow),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("Looking in indexes"):
            break
    installers = descendants(process)
    assert installers
    process.send_signal(number)
    if number == signal.SIGKILL:  # nobody is left to end them
        process.wait(10)
        for each in installers:
            each.kill()
        assert len(place.left()) == 1
    else:
        _, stderr = process.communicate(timeout=10)
        assert process.returncode == 130
        assert stderr.splitlines()[-1] == "interrupted"
        assert not list(filter(runs, installers))
        assert place.left() == []
    process.communicate()
    assert "mine: needs other packages" in place.qbench("worker", "--list").stdout
    place.make()
    assert place.ask("__import__('qprobe').VERSION") == "1.0"


def test_only_one_is_made_at_a_time(place: Place) -> None:
    place.write("qprobe")
    place.home.mkdir(parents=True)
    with (place.home / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = place.qbench("worker", "--make-env", "mine")
    assert_bad_input(done, "its environment is being made or removed by another process")


def test_a_cache_that_cant_be_written(place: Place) -> None:
    place.write("qprobe")
    place.cache.write_text("no folder")
    assert_bad_input(place.qbench("worker", "--make-env", "mine"), "can't be used", "Set QBENCH_CACHE")


# Out of date, dropped, and made again


def test_one_made_for_another_header_is_not_used_and_said_to_be_out_of_date(place: Place) -> None:
    place.write("qprobe==1.0")
    place.make()
    (old,) = place.home.glob("*/")
    place.write("qprobe==2.0")
    line = (
        "mine: its environment is out of date and not used (the packages in its header changed): "
        f"qbench-worker --workers {place.folder}/workers --make-env mine"
    )
    options = ["-p", "mine", "--dry-run", "-m", "random:qwen2.5-0.5b", "--device", "cpu"]
    dry = place.qbench("orchestrate", *options)
    assert line in dry.stderr.splitlines()
    assert "qprobe is not installed" in dry.stdout
    assert line in place.qbench("worker", "--list").stdout.splitlines()
    # Until the new one is finished the old one stays.
    assert_bad_input(
        place.qbench("worker", "--make-env", "mine", PIP_FIND_LINKS="absent"), "can't be resolved"
    )
    assert old.is_dir()
    place.make()
    assert place.ask("__import__('qprobe').VERSION") == "2.0"
    assert not old.exists()
    assert len(place.left()) == 2  # the new one and its lock
    assert place.qbench("orchestrate", *options).stderr == ""


def test_one_whose_python_is_gone_is_out_of_date(place: Place) -> None:
    place.write("qprobe==1.0")
    place.make()
    (python,) = place.home.glob("*/venv/bin/python")
    python.unlink()
    python.symlink_to("/no/such/python")
    assert "not used (its Python is gone)" in place.qbench("worker", "--list").stdout
    place.make()
    assert place.ask("__import__('qprobe').VERSION") == "1.0"


def test_a_dropped_one_is_gone_and_its_lock_makes_the_same_again(place: Place) -> None:
    (place.index / "qprobe-2.0-py3-none-any.whl").unlink()
    place.write("qprobe")
    place.make()
    shutil.rmtree(place.folder / "workers")  # it can be dropped without its worker
    (place.folder / "workers").mkdir()
    done = place.qbench("worker", "--drop-env", "mine")
    (lock,) = place.home.glob("*.txt")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"mine has no environment of its own any more; its lock is kept: {lock}\n"
    assert place.left() == [lock.name]
    place.write("qprobe")
    assert "qprobe is not installed" in place.qbench("worker", "--list").stdout
    make_wheel(place.index, "qprobe", "3.0")
    place.make()
    assert place.ask("__import__('qprobe').VERSION") == "1.0"
    # Both at once: with the lock removed it is made with what is newest.
    for each in place.home.glob("*.txt"):
        each.unlink()
    assert place.qbench("worker", "--drop-env", "mine", "--make-env", "mine").returncode == 0


def test_what_has_none_cant_be_dropped(place: Place) -> None:
    place.write("qprobe")
    assert_bad_input(
        place.qbench("worker", "--drop-env", "mine"), "has no environment of its own. No precision"
    )
    place.make()
    assert_bad_input(place.qbench("worker", "--drop-env", "../mine"), "These have one: mine.")
    assert_bad_input(place.qbench("worker", "--make-env", "mind"), "--make-env mind", "Did you mean mine?")


# Locks


def test_an_archive_of_another_hash_is_refused(place: Place) -> None:
    place.write("qprobe==1.0")
    place.make()
    place.qbench("worker", "--drop-env", "mine")
    with zipfile.ZipFile(place.index / "qprobe-1.0-py3-none-any.whl", "a") as archive:
        archive.writestr("evil.py", "")
    done = place.qbench("worker", "--make-env", "mine")
    (lock,) = place.home.glob("*.txt")
    said = "its lock can't be installed (THESE PACKAGES DO NOT MATCH THE HASHES"
    assert_bad_input(done, said, f"Try again, or remove {lock} to resolve its packages anew")
    assert place.left() == [lock.name]


def write_lock(place: Place, text: str) -> None:
    (place.folder / "workers/locks").mkdir(exist_ok=True)
    (place.folder / "workers/locks/mine.txt").write_text(text)


def test_a_lock_beside_the_worker_decides_but_for_what_is_borrowed(place: Place) -> None:
    place.write("torch>=2.6", "qprobe")
    digest = sha256(place.index / "qprobe-1.0-py3-none-any.whl")
    # As `uv pip compile --generate-hashes` writes it. The hash of torch is of no archive there is.
    torch = version("torch").partition("+")[0]
    write_lock(
        place,
        f"""\
# This file was autogenerated by uv via the following command:
torch=={torch} \\
    --hash=sha256:{"0" * 64}
    # via mine.py
qprobe==1.0 \\
    --hash=sha256:{"1" * 64} \\
    --hash=sha256:{digest}
    # via mine.py
""",
    )
    place.make()
    assert place.ask("__import__('qprobe').VERSION") == "1.0"
    assert place.ask("u.find_spec('torch') is not None")
    write_lock(place, f"qprobe==1.0 --hash=sha256:{digest}\n")
    assert "not used (the lock beside its worker changed)" in place.qbench("worker", "--list").stdout


@pytest.mark.parametrize(
    ("lock", "said"),
    [
        ("qprobe=1.0\n", "workers/locks/mine.txt: can't be read as a lock"),
        ("qprobe==1.0\n", "its lock can't be installed (Hashes are required in --require-hashes mode"),
        ("qneed==1.5 --hash=sha256:{}\n", "not what its header asks for (qprobe is not installed). Mend "),
    ],
)
def test_a_lock_beside_the_worker_that_cant_be_used(place: Place, lock: str, said: str) -> None:
    place.write("qprobe")
    write_lock(place, lock.format(sha256(place.index / "qneed-1.5-py3-none-any.whl")))
    assert_bad_input(place.qbench("worker", "--make-env", "mine"), said)
    assert not [path for path in place.home.glob("*/") if path.is_dir()]


# From the real index


def fetched(folder: Path, requirement: str) -> Path:
    """A package from PyPI in a folder of its own; skips the test where it can't be had."""
    options = ["--quiet", "--no-deps", "--retries", "1", "--target", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, requirement], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"{requirement} can't be had here: {done.stderr.strip().splitlines()[-1]}")
    return folder


def test_a_package_from_pypi(place: Place, tmp_path: Path) -> None:
    fetched(tmp_path / "six", "six==1.15.0")
    place.write("torch>=2.6", "six==1.15.0")
    own = {name: os.environ[name] for name in ("PIP_FIND_LINKS",) if name in os.environ}
    place.make(**({"PIP_NO_INDEX": "0", "PIP_FIND_LINKS": ""} | own))
    assert place.ask("__import__('six').__version__") == "1.15.0"
    (lock,) = place.home.glob("*.txt")
    digest = "8b74bedcbbbaca38ff6d7491d76f2b06b3592611af620f8426e82dddb04a5ced"
    assert lock.read_text().splitlines()[1:] == [f"six==1.15.0 --hash=sha256:{digest}"]


def test_uv_installs_where_it_is_on_path(place: Place, tmp_path: Path) -> None:
    uv = fetched(tmp_path / "uv", "uv") / "bin"
    place.write("torch>=2.6", "qprobe==2.0")
    settings = {
        "UV_NO_INDEX": "1",
        "UV_FIND_LINKS": str(place.index),
        "UV_CACHE_DIR": str(tmp_path / "uv-cache"),
    }
    path = os.pathsep.join([str(uv), place.environment()["PATH"]])
    done = place.make(PATH=path, **settings)
    assert " + qprobe==2.0" in done.stderr
    assert place.ask("[__import__('qprobe').VERSION, __import__('qneed').VERSION]") == ["2.0", "1.5"]
    place.qbench("worker", "--drop-env", "mine")
    with zipfile.ZipFile(place.index / "qprobe-2.0-py3-none-any.whl", "a") as archive:
        archive.writestr("evil.py", "")
    settings["UV_CACHE_DIR"] = str(tmp_path / "empty")  # in its own cache uv has what the hash is of
    failed = place.qbench("worker", "--make-env", "mine", PATH=path, **settings)
    assert_bad_input(failed, "its lock can't be installed (Hash mismatch for `qprobe==2.0")
