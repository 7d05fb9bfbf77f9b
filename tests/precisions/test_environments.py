"""Environments for single precisions, as a user makes, uses and drops them, from an index of tiny wheels.

The wheels are built here, so that no network is needed and the index can be changed. The parent's packages
are installed in a folder on PYTHONPATH.
"""

import fcntl
import hashlib
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import uv
from commands import command, environment, run
from golden_text import Golden

from orchestrator.records.store import read_run
from schemas.frames import Done

pytestmark = pytest.mark.slow

WORKER = '''\
# /// script
# requires-python = "{python}"
# dependencies = {needs}
# [tool.qbench]
# precision = "{name}"
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

BACKEND = """\
import shutil


def build_wheel(folder, config_settings=None, metadata_directory=None):
    return shutil.copy("built-1.0-py3-none-any.whl", folder).rpartition("/")[2]
"""
"""A build backend, whose source distributions hold the finished wheel."""


def make_wheel(folder: Path, name: str, number: str, *needs: str, module: str = "") -> Path:
    """A wheel with one module, whose VERSION is the wheel's version."""
    info = f"{name}-{number}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n"]
    files = {
        f"{name}.py": f"VERSION = {number!r}\n{module}",
        f"{info}/METADATA": "".join([*metadata, *(f"Requires-Dist: {need}\n" for need in needs)]),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n",
    }
    wheel = folder / f"{name}-{number}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return wheel


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Place(NamedTuple):
    """A user's folder with worker files, an index of wheels, the parent's packages, and a cache."""

    folder: Path

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def index(self) -> Path:
        return self.folder / "index"

    @property
    def parents(self) -> Path:
        return self.folder / "parents"

    @property
    def home(self) -> Path:
        return self.cache / "environments/mine"

    @property
    def lock(self) -> Path:
        return self.home / "lock.txt"

    def environment(self, **more: str) -> dict[str, str]:
        uv_settings = {
            "UV_CONFIG_FILE": str(self.folder / "uv.toml"),
            "UV_CACHE_DIR": str(self.folder / "uv"),
        }
        return environment(self.cache, **({"PYTHONPATH": str(self.parents)} | uv_settings | more))

    def write(self, *needs: str, python: str = ">=3.11", name: str = "mine") -> None:
        (self.folder / "workers").mkdir(exist_ok=True)
        text = WORKER.format(needs=json.dumps(needs), python=python, name=name)
        (self.folder / f"workers/{name}.py").write_text(text)

    def write_lock(self, text: str) -> None:
        (self.folder / "workers/locks").mkdir(exist_ok=True)
        (self.folder / "workers/locks/mine.txt").write_text(text)

    def give_parent(self, wheel: Path) -> None:
        """Install a wheel among the parent's packages."""
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(self.parents)

    def qbench(self, script: str, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        argv = command(script, "--workers", "workers", *arguments)
        return run(argv, self.folder, self.environment(**variables))

    def make(self, **variables: str) -> "subprocess.CompletedProcess[str]":
        done = self.qbench("worker", "--make-env", "mine", **variables)
        assert done.returncode == 0, done.stderr
        return done

    def drop(self) -> "subprocess.CompletedProcess[str]":
        done = self.qbench("worker", "--drop-env", "mine")
        assert done.returncode == 0, done.stderr
        return done

    def refused(self, *arguments: str, reason: str = "", **variables: str) -> str:
        """The line that ends a command, after the reason that uv gave. There is no traceback."""
        done = self.qbench("worker", *arguments, **variables)
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        assert reason in done.stderr.rpartition("error: ")[0]
        return self.shown(done.stderr.splitlines()[-1])

    def listed(self) -> str:
        """The list's line about the precision, below the table."""
        done = self.qbench("worker", "--list")
        return self.shown("\n".join(line for line in done.stdout.splitlines() if line.startswith("mine: ")))

    def shown(self, text: str) -> str:
        """`text` without what differs between machines."""
        return re.sub(r"\S+/bin/python[\d.]*", "PYTHON", text.replace(str(self.folder), "PLACE"))

    def interpreter(self) -> str:
        """The Python that the precision would run under."""
        options = ["-p", "mine", "--dry-run", "-m", "random:qwen2.5-0.5b", "--device", "cpu"]
        done = self.qbench("orchestrate", *options)
        assert done.returncode == 0, done.stderr
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("mine: ")]
        return line

    def ask(self, code: str) -> Any:
        """Value of an expression in the environment, in a Python started the way a worker is."""
        program = f"import json, os, sys, importlib.util as u\nprint(json.dumps({code}))"
        argv = [self.home / "venv/bin/python", "-P", "-c", program]
        return json.loads(subprocess.check_output(argv, env=environment(self.cache), cwd=self.folder))

    def installed(self) -> set[str]:
        """Packages that are installed in the environment itself, not those it reuses."""
        (site,) = self.home.glob("venv/lib/python*/site-packages")
        return {path.name.partition("-")[0] for path in site.glob("*.dist-info")}

    def reused(self) -> list[str]:
        return list(json.loads(self.lock.read_text().partition("\n")[0].removeprefix("# "))["reused"])

    def pins(self) -> list[str]:
        return self.lock.read_text().splitlines()[1:]

    def left(self) -> list[str]:
        """Contents of the cache of environments, without the lock file."""
        return sorted(path.name for path in self.home.iterdir() if path.name != ".lock")


def make_place(folder: Path) -> Place:
    place = Place(folder)
    place.index.mkdir()
    place.parents.mkdir()
    (folder / "uv.toml").write_text(f'no-index = true\nfind-links = ["{place.index}"]\n')
    make_wheel(place.index, "qprobe", "1.0")
    make_wheel(place.index, "qprobe", "2.0", "qneed>=1")
    make_wheel(place.index, "qneed", "1.5")
    make_wheel(place.index, "setuptools", "999.0")  # in case the installed one is older than torch requires
    return place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path)


# One environment in all respects


class Made(NamedTuple):
    place: Place
    done: "subprocess.CompletedProcess[str]"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Two precisions pin different versions of qprobe. The parent has one of them."""
    place = make_place(tmp_path_factory.mktemp("environments"))
    place.give_parent(place.index / "qprobe-1.0-py3-none-any.whl")
    needs = ["torch>=2.6", "transformers>=5.17,<6", "accelerate>=1.10", "gguf>=0.17"]
    place.write(*needs, "qprobe==2.0")
    place.write(*needs, "qprobe==1.0", name="theirs")
    return Made(place, place.make())


def test_making_it_prints_progress(made: Made) -> None:
    assert made.done.stdout == f"mine has its own environment: {made.place.home}\n"
    assert f"making an environment for mine: {made.place.home}\n" in made.done.stderr
    assert " + qprobe==2.0" in made.done.stderr
    assert made.place.left() == ["lock.txt", "venv"]


def test_torch_is_the_parents_and_is_not_installed_again(made: Made) -> None:
    import torch

    found = made.place.ask("os.path.realpath(__import__('torch').__file__)")
    assert Path(found) == Path(torch.__file__).resolve()
    assert f"torch=={torch.__version__}" in made.place.reused()
    assert {"qprobe", "qneed"} <= made.place.installed() <= {"qprobe", "qneed", "setuptools"}
    assert made.place.ask("__import__('torch').ones(2).sum().item()") == 2


def test_its_own_packages_come_before_the_parents(made: Made) -> None:
    assert made.place.ask("[__import__('qprobe').VERSION, __import__('qneed').VERSION]") == ["2.0", "1.5"]
    own, parents = made.place.ask("[path for path in sys.path if os.path.exists(path + '/qprobe.py')]")
    assert own.startswith(str(made.place.home))
    assert parents == str(made.place.parents)
    assert made.place.ask("u.find_spec('msgspec') is not None")


def test_the_lock_has_the_hash_of_every_archive(made: Made) -> None:
    index = made.place.index
    assert [pin for pin in made.place.pins() if not pin.startswith("setuptools")] == [
        f"qneed==1.5 --hash=sha256:{sha256(index / 'qneed-1.5-py3-none-any.whl')}",
        f"qprobe==2.0 --hash=sha256:{sha256(index / 'qprobe-2.0-py3-none-any.whl')}",
    ]


def test_it_is_used_unless_another_python_is_named(made: Made, golden: Golden) -> None:
    assert made.place.interpreter().endswith(f"under {made.place.home}/venv/bin/python")
    options = ["-p", "mine", "--dry-run", "-m", "random:qwen2.5-0.5b", "--python", f"mine={sys.executable}"]
    done = made.place.qbench("orchestrate", *options)
    golden(made.place.shown(done.stdout))


def test_the_list_names_precisions_with_an_environment(made: Made) -> None:
    done = made.place.qbench("orchestrate", "--list")
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert rows["mine"].split()[2:5] == ["yes", "its", "own"]
    assert rows["theirs"].split()[2:4] == ["yes", "qbench's"]


def test_making_it_again_does_nothing(made: Made) -> None:
    before = (made.place.home / "venv/lock.txt").stat().st_mtime_ns
    done = made.place.make()
    assert done.stdout == made.done.stdout
    assert done.stderr == ""
    assert (made.place.home / "venv/lock.txt").stat().st_mtime_ns == before


def test_one_run_measures_conflicting_pins_each_in_its_own_environment(made: Made, tiny_llama: Path) -> None:
    folder = made.place.folder
    (folder / "prompts.txt").write_text("Why is the sky blue?\nName a river.\n")
    options = ["-p", "mine", "-p", "theirs", "-m", str(tiny_llama), "--new-tokens", "10", "--device", "cpu"]
    done = made.place.qbench("orchestrate", *options, "--prompts", "prompts.txt", "--out", "run")
    assert done.returncode == 0, done.stdout + done.stderr
    mine, theirs = read_run(folder / "run").cells
    assert isinstance(mine.outcome, Done), mine.outcome
    assert isinstance(theirs.outcome, Done), theirs.outcome
    assert mine.ready
    assert theirs.ready
    assert theirs.ready.versions["qprobe"] == "1.0"
    assert mine.ready.versions == theirs.ready.versions | {"qprobe": "2.0"}
    assert [trial.token_ids for trial in mine.trials] == [trial.token_ids for trial in theirs.trials]


# Reused packages


def test_a_compatible_package_is_reused_with_its_dependencies(place: Place) -> None:
    wheels = place.folder / "wheels"
    wheels.mkdir()
    place.give_parent(make_wheel(wheels, "qbig", "2.0+cu130", "qsmall>=1"))
    place.give_parent(make_wheel(wheels, "qsmall", "1.1", "qbig"))  # packages may need each other
    place.give_parent(make_wheel(wheels, "qold", "1.0", "qsmall"))
    place.give_parent(make_wheel(wheels, "qbroken", "1.0"))
    (place.parents / "qbroken-1.0.dist-info/METADATA").unlink()
    for name in ("qbig", "qsmall", "qold", "qbroken"):
        make_wheel(place.index, name, "3.0")
    place.write("qbig>=1", "qold>=2", "qbroken")
    place.make()
    assert set(place.reused()) >= {"qbig==2.0+cu130", "qsmall==1.1"}
    assert place.installed() == {"qold", "qbroken"}
    names = ["qbig", "qsmall", "qold", "qbroken"]
    versions = place.ask(f"[__import__(name).VERSION for name in {names}]")
    assert versions == ["2.0+cu130", "1.1", "3.0", "3.0"]


def test_an_incompatible_package_is_installed_and_the_parents_is_untouched(
    place: Place,
) -> None:
    wheels = place.folder / "wheels"
    wheels.mkdir()
    place.give_parent(make_wheel(wheels, "qbig", "2.0", "qsmall<2"))
    place.give_parent(make_wheel(wheels, "qsmall", "1.0"))
    before = {path: path.stat().st_mtime_ns for path in place.parents.rglob("*")}
    make_wheel(place.index, "qsmall", "2.0")
    make_wheel(place.index, "qbig", "2.1", "qsmall>=2")
    place.write("qbig", "qsmall==2.0")  # the parent's qbig would fit, but doesn't accept this qsmall
    place.make()
    assert place.installed() == {"qbig", "qsmall"}
    place.drop()
    assert {path: path.stat().st_mtime_ns for path in place.parents.rglob("*")} == before


def test_pth_files_and_editable_packages_of_the_parents_are_followed(place: Place) -> None:
    source = place.folder / "source"
    source.mkdir()
    (source / "qedit.py").write_text("VERSION = 'edited'\n")
    place.give_parent(make_wheel(place.folder, "qother", "1.0"))
    (place.parents / "qedit.pth").write_text(f"{source}\n")
    place.write("qprobe==1.0")
    place.make()
    assert place.ask("__import__('qedit').VERSION") == "edited"


def test_a_header_that_needs_another_torch_gets_it(place: Place) -> None:
    make_wheel(place.folder, "torch", "2.0")
    place.write("torch==2.0", "qprobe==1.0")
    place.make(UV_FIND_LINKS=str(place.folder))  # found there, and qprobe where the settings say
    assert place.ask("__import__('torch').VERSION") == "2.0"
    assert place.reused() == [pin for pin in place.reused() if pin.startswith("msgspec==")]


def test_builds_do_not_use_reused_packages(place: Place) -> None:
    """While uv resolves, the parent's packages are wheels without modules, and could not build anything."""
    finished = make_wheel(place.folder, "built", "1.0")
    project = '[build-system]\nrequires = ["qbackend"]\nbuild-backend = "qbackend"\n'
    with tarfile.open(place.index / "built-1.0.tar.gz", "w:gz") as archive:
        archive.add(finished, f"built-1.0/{finished.name}")
        for name, text in {"pyproject.toml": project, "PKG-INFO": "Metadata-Version: 1.0\n"}.items():
            member = tarfile.TarInfo(f"built-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    place.give_parent(make_wheel(place.folder, "qbackend", "2.0"))
    make_wheel(place.index, "qbackend", "1.0", module=BACKEND)
    place.write("built")
    place.make()
    assert place.ask("__import__('built').VERSION") == "1.0"


def test_an_environment_with_a_changed_reused_package_is_outdated(place: Place, golden: Golden) -> None:
    place.give_parent(place.index / "qprobe-1.0-py3-none-any.whl")
    place.write("qprobe")
    place.make()
    assert "qprobe==1.0" in place.reused()
    shutil.rmtree(place.parents)
    place.parents.mkdir()
    golden(place.listed())
    place.give_parent(place.index / "qprobe-2.0-py3-none-any.whl")
    golden(place.listed())
    place.make()
    assert "qprobe==2.0" in place.reused()
    assert place.installed() == {"qneed"}


# Failures leave nothing behind behind


def test_a_package_that_does_not_exist(place: Place, golden: Golden) -> None:
    place.write("no-such-package>=1", "qprobe")
    golden(place.refused("--make-env", "mine", reason="no-such-package"))
    assert place.left() == []
    golden(place.listed())


def test_conflicting_packages(place: Place, golden: Golden) -> None:
    place.write("qprobe==2.0", "qneed==1.0")
    make_wheel(place.index, "qneed", "1.0")
    make_wheel(place.index, "qprobe", "2.0", "qneed>=1.5")
    golden(place.refused("--make-env", "mine", reason="qneed==1.0"))
    assert place.left() == []


def test_a_python_that_is_not_installed(place: Place, golden: Golden) -> None:
    place.write("qprobe", python=">=3.99")
    golden(place.refused("--make-env", "mine"))
    assert place.left() == []
    assert "qbench-worker --workers PLACE/workers --make-env mine" in place.listed()


@pytest.fixture
def silent_index() -> Iterator[socket.socket]:
    """An index that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def runs(process: psutil.Process) -> bool:
    """Whether it is alive; a zombie is dead, and its new parent will wait for it."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupt_leaves_no_partial_environment(
    place: Place, silent_index: socket.socket, number: signal.Signals
) -> None:
    place.write("qprobe==1.0")
    settings = {"UV_DEFAULT_INDEX": f"http://127.0.0.1:{silent_index.getsockname()[1]}/simple"}
    process = subprocess.Popen(
        command("worker", "--workers", "workers", "--make-env", "mine"),
        cwd=place.folder,
        env=place.environment(UV_CONFIG_FILE="/dev/null", **settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    connection, _ = silent_index.accept()
    installers = psutil.Process(process.pid).children(recursive=True)
    assert installers
    process.send_signal(number)
    if number == signal.SIGKILL:  # then no process ends them
        process.wait(60)
        for each in installers:
            each.kill()
        process.communicate()
        assert place.left() == ["unfinished"]
    else:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 130
        assert stderr.splitlines()[-1] == "interrupted"
        assert not list(filter(runs, installers))
        assert place.left() == []
    connection.close()
    assert "qprobe is not installed" in place.listed()
    place.make()
    assert place.left() == ["lock.txt", "venv"]
    assert place.ask("__import__('qprobe').VERSION") == "1.0"


def test_only_one_process_makes_it_at_a_time(place: Place, golden: Golden) -> None:
    place.write("qprobe")
    place.home.mkdir(parents=True)
    with (place.home / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        golden(place.refused("--make-env", "mine"))


def test_a_cache_that_is_not_writable(place: Place, golden: Golden) -> None:
    place.write("qprobe")
    place.cache.write_text("no folder")
    golden(place.refused("--make-env", "mine"))


# Outdated, dropped, made again


def test_an_environment_for_another_header_is_outdated_and_not_used(place: Place, golden: Golden) -> None:
    place.write("qprobe==1.0")
    place.make()
    place.write("qprobe==2.0")
    options = ["-p", "mine", "--dry-run", "-m", "random:qwen2.5-0.5b", "--device", "cpu"]
    dry = place.qbench("orchestrate", *options)
    (line,) = [line for line in dry.stderr.splitlines() if "outdated" in line]
    golden(place.shown(line))
    assert "qprobe is not installed" in dry.stdout
    assert place.shown(line) in place.listed().splitlines()
    # The old one stays until the new one is finished.
    (place.index / "qprobe-2.0-py3-none-any.whl").rename(place.folder / "aside.whl")
    place.refused("--make-env", "mine", reason="qprobe==2.0")
    assert place.ask("__import__('qprobe').VERSION") == "1.0"
    (place.folder / "aside.whl").rename(place.index / "qprobe-2.0-py3-none-any.whl")
    place.make()
    assert place.ask("__import__('qprobe').VERSION") == "2.0"
    assert place.left() == ["lock.txt", "venv"]
    assert place.qbench("orchestrate", *options).stderr == ""


def test_an_environment_without_its_python_is_outdated(place: Place, golden: Golden) -> None:
    place.write("qprobe==1.0")
    place.make()
    python = place.home / "venv/bin/python"
    python.unlink()
    python.symlink_to("/no/such/python")
    golden(place.listed())
    place.make()
    assert place.ask("__import__('qprobe').VERSION") == "1.0"


def test_a_dropped_environment_can_be_made_again_from_its_lock(place: Place, golden: Golden) -> None:
    (place.index / "qprobe-2.0-py3-none-any.whl").unlink()
    place.write("qprobe")
    place.make()
    shutil.rmtree(place.folder / "workers")  # even without its worker
    (place.folder / "workers").mkdir()
    golden(place.shown(place.drop().stdout))
    assert place.left() == ["lock.txt"]
    place.write("qprobe")
    assert "qprobe is not installed" in place.listed()
    make_wheel(place.index, "qprobe", "3.0")
    place.make()
    assert place.ask("__import__('qprobe').VERSION") == "1.0"
    # With both files dropped, it is made with the newest versions.
    place.lock.unlink()
    assert place.qbench("worker", "--drop-env", "mine", "--make-env", "mine").returncode == 0
    assert place.ask("__import__('qprobe').VERSION") == "3.0"


def test_dropping_an_environment_that_does_not_exist(place: Place, golden: Golden) -> None:
    place.write("qprobe")
    golden(place.refused("--drop-env", "mine"))
    place.make()
    golden(place.refused("--drop-env", "../mine"))
    golden(place.refused("--make-env", "mind").partition(" There are")[0])


# Locks


def test_an_archive_with_another_hash_is_refused(place: Place, golden: Golden) -> None:
    place.write("qprobe==1.0")
    place.make()
    place.drop()
    with zipfile.ZipFile(place.index / "qprobe-1.0-py3-none-any.whl", "a") as archive:
        archive.writestr("evil.py", "")
    # uv's cache has the file with the right hash.
    empty = str(place.folder / "empty")
    golden(place.refused("--make-env", "mine", reason="Hash mismatch", UV_CACHE_DIR=empty))
    assert place.left() == ["lock.txt"]


def test_a_lock_next_to_the_worker_decides_except_for_reused_packages(place: Place, golden: Golden) -> None:
    place.give_parent(make_wheel(place.folder, "qbig", "2.13.0+cu130"))
    place.write("qbig>=2.6", "qprobe")
    digest = sha256(place.index / "qprobe-1.0-py3-none-any.whl")
    # As `uv pip compile --generate-hashes` writes it. The hash of qbig is of no archive there is.
    place.write_lock(f"""\
# This file was autogenerated by uv via the following command:
qbig==2.13.0 ; python_version < '4' \\
    --hash=sha256:{"0" * 64}
    # via mine.py
qprobe==1.0 \\
    --hash=sha256:{"1" * 64} \\
    --hash=sha256:{digest}
    # via mine.py
""")
    place.make()
    assert place.ask("__import__('qprobe').VERSION") == "1.0"
    assert place.ask("__import__('qbig').VERSION") == "2.13.0+cu130"
    assert place.reused() == ["qbig==2.13.0+cu130"]
    place.write_lock(f"qprobe==1.0 --hash=sha256:{digest}  # by hand\n")
    golden(place.listed())
    place.make()
    assert place.pins() == [f"qprobe==1.0 --hash=sha256:{digest}"]


@pytest.mark.parametrize(
    "lock",
    ["qprobe=1.0\n", "qprobe==1.0\n", "qneed==1.5 --hash=sha256:{}\n"],
    ids=["not a requirement", "no hash", "another package"],
)
def test_an_unusable_lock_next_to_the_worker(place: Place, lock: str, golden: Golden) -> None:
    place.write("qprobe")
    place.write_lock(lock.format(sha256(place.index / "qneed-1.5-py3-none-any.whl")))
    golden(place.refused("--make-env", "mine"))
    assert place.left() == ["lock.txt"]
    place.write_lock(f"qprobe==1.0 --hash=sha256:{sha256(place.index / 'qprobe-1.0-py3-none-any.whl')}\n")
    place.make()


def test_a_requirement_without_a_hash_is_refused(place: Place, golden: Golden) -> None:
    """A local folder, for example."""
    source = place.folder / "source"
    source.mkdir()
    (source / "pyproject.toml").write_text('[project]\nname = "qfolder"\nversion = "1"\n')
    place.write(f"qfolder @ file://{source}")
    golden(place.refused("--make-env", "mine", reason="hash"))


# From PyPI


def test_a_package_from_pypi(place: Place) -> None:
    probe = [uv.find_uv_bin(), "pip", "compile", "--quiet", "--python", sys.executable, "-"]
    if subprocess.run(probe, input="six==1.15.0", text=True, capture_output=True).returncode:
        pytest.skip("six==1.15.0 is unavailable here")
    place.write("six==1.15.0")
    place.make(UV_CONFIG_FILE="/dev/null")
    assert place.ask("__import__('six').__version__") == "1.15.0"
    digest = "8b74bedcbbbaca38ff6d7491d76f2b06b3592611af620f8426e82dddb04a5ced"
    (pin,) = place.pins()
    assert pin.startswith("six==1.15.0 --hash=sha256:")
    assert f" --hash=sha256:{digest}" in pin
