"""NVML and the memory sampler, through pynvml's real ctypes path into a fake driver library.

Every test asks a fresh Python process: a process loads `libnvidia-ml.so.1` only once. Its script leaves
what it found in `answer`, which comes back as JSON.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from fake_nvml import (  # noqa: F401
    GPU_UUID,
    ONE_GPU,
    FakeNvml,
    answer_of,
    fake_nvml_fixture,
    nvml_answer,
)

ROOT = Path(__file__).parents[2]
OTHER_UUID = "GPU-99999999-2222-3333-4444-555555555555"

STATE = {
    "sm_clock_mhz": 1980,
    "memory_clock_mhz": 2619,
    "temperature_c": 45,
    "power_w": 350.5,
    "clock_limits": [],
    "power_limited_s": None,
    "thermal_limited_s": None,
}
COUNTERS = {"power_limited_s": 2.5, "thermal_limited_s": 0.0}
LINES = ONE_GPU.splitlines(keepends=True)
UNKNOWN = dict.fromkeys(STATE, None)

WORKER = """
print("up", flush=True)
input()
block = b"x" * 64_000_000
print("full", flush=True)
input()
"""

START_WORKER = f"""\
pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
worker = subprocess.Popen([sys.executable, "-c", {WORKER!r}, "workers.play"], **pipes)
worker.stdout.readline()  # before it is up, it may not even have its own command line yet
"""


def why_unavailable(fake: FakeNvml) -> str:
    script = "try:\n    with Nvml.open():\n        answer = 'it opened'\nexcept NvmlUnavailable as error:\n"
    return str(answer_of(fake, script + "    answer = str(error)"))


def test_a_gpu_is_described(fake_nvml: FakeNvml) -> None:
    driver, gpus = nvml_answer(fake_nvml, "[nvml.driver, nvml.gpus()]")
    assert driver == "580.95.05"
    assert gpus == [
        {
            "index": 0,
            "uuid": GPU_UUID,
            "name": "Fake H100 80GB",
            "memory_bytes": 85899345920,
            "compute_capability": [9, 0],
            "memory_info_version": 2,
        }
    ]


def test_memory_info_v2_leaves_out_what_the_driver_reserves(fake_nvml: FakeNvml) -> None:
    assert nvml_answer(fake_nvml, "nvml.device_bytes(UUID)") == 1_000_000


def test_an_old_driver_falls_back_to_memory_info_v1_and_says_so(fake_nvml: FakeNvml) -> None:
    fake_nvml.write("memory_info_version 1\n" + ONE_GPU)
    answer = nvml_answer(fake_nvml, "[nvml.gpus()[0].memory_info_version, nvml.device_bytes(UUID)]")
    assert answer == [1, 501_000_000]


def test_a_gpu_is_found_by_uuid_whatever_its_index(fake_nvml: FakeNvml) -> None:
    fake_nvml.write(f"driver 1\ndevice {OTHER_UUID} Another\nused 7\n" + ONE_GPU)
    answer = nvml_answer(fake_nvml, f"[nvml.device_bytes(UUID), nvml.device_bytes({OTHER_UUID!r})]")
    assert answer == [1_000_000, 7]


def test_a_gpu_that_does_not_answer_leaves_the_others(fake_nvml: FakeNvml) -> None:
    fake_nvml.write(f"device {OTHER_UUID} Broken\nlost 1\n" + ONE_GPU)
    assert nvml_answer(fake_nvml, "[(gpu.index, gpu.uuid) for gpu in nvml.gpus()]") == [[1, GPU_UUID]]


def test_an_unknown_uuid_is_named_as_such(fake_nvml: FakeNvml) -> None:
    script = """\
with Nvml.open() as nvml:
    try:
        nvml.device_bytes("GPU-0")
    except NvmlUnavailable as error:
        answer = str(error)
"""
    assert answer_of(fake_nvml, script) == "NVML knows no GPU of this UUID"


@pytest.mark.parametrize(
    ("lines", "used_bytes", "reason"),
    [
        pytest.param("process 4242 300\n", 300, None, id="listed"),
        pytest.param("process 4242 300\nprocess 4242 40\n", 340, None, id="listed twice"),
        pytest.param("process 4242 none\n", None, "does not tell", id="not told"),
        pytest.param("process 17 300\n", None, "no process 4242", id="hidden pid"),
        pytest.param("", None, "no process 4242", id="no process"),
        pytest.param("process_error 13\n", None, "too old", id="library mismatch"),
        pytest.param("process_error 4\n", None, "Insufficient Permissions", id="refused"),
    ],
)
def test_process_bytes_or_the_reason_why_not(
    fake_nvml: FakeNvml, lines: str, used_bytes: int | None, reason: str | None
) -> None:
    fake_nvml.write(ONE_GPU + lines)
    found_bytes, why = nvml_answer(fake_nvml, "nvml.process_bytes(UUID, 4242)")
    assert found_bytes == used_bytes
    assert why is None if reason is None else reason in why


def test_a_foreign_process_can_be_named(fake_nvml: FakeNvml) -> None:
    fake_nvml.write(ONE_GPU + "process 17 5000\nprocess 18 none\n")
    assert nvml_answer(fake_nvml, "nvml.processes(UUID)") == [[17, 5000], [18, None]]


def test_a_live_worker_is_found_by_its_command_line(fake_nvml: FakeNvml) -> None:
    fake_nvml.write(ONE_GPU + "processes_auto 612000000\n")
    script = """\
with Nvml.open() as nvml, worker:
    answer = nvml.process_bytes(UUID, worker.pid)
    worker.kill()
"""
    assert answer_of(fake_nvml, START_WORKER + script) == [612_000_000, None]


def test_how_a_gpu_runs_with_and_without_counters(fake_nvml: FakeNvml) -> None:
    answer = nvml_answer(fake_nvml, "[nvml.state(UUID, counters) for counters in (False, True)]")
    assert answer == [STATE, STATE | COUNTERS]


def test_a_figure_that_is_refused_is_unknown_by_itself(fake_nvml: FakeNvml) -> None:
    figures = {
        "sm_clock": "sm_clock_mhz",
        "memory_clock": "memory_clock_mhz",
        "temperature": "temperature_c",
        "power_mw": "power_w",
        "violation_power_ns": "power_limited_s",
        "violation_thermal_ns": "thermal_limited_s",
        "clock_reasons": "clock_limits",
    }
    without = ["".join(line for line in LINES if not line.startswith(key + " ")) for key in figures]
    script = f"""\
answer = []
with Nvml.open() as nvml:
    for state in {without!r}:
        write_state(state)
        answer.append(nvml.state(UUID, counters=True))
"""
    answers = answer_of(fake_nvml, script)
    assert answers == [STATE | COUNTERS | {field: UNKNOWN[field]} for field in figures.values()]


@pytest.mark.parametrize(
    ("lines", "limits"),
    [
        pytest.param("clock_reasons 1\n", [], id="idle"),
        pytest.param("clock_reasons 5\n", ["sw_power_cap"], id="idle and capped"),
        pytest.param("clock_reasons 96\n", ["sw_thermal_slowdown", "hw_thermal_slowdown"], id="hot"),
        pytest.param(
            "clock_reasons 511\n",
            [
                "applications_clocks_setting",
                "sw_power_cap",
                "hw_slowdown",
                "sync_boost",
                "sw_thermal_slowdown",
                "hw_thermal_slowdown",
                "hw_power_brake_slowdown",
                "display_clock_setting",
            ],
            id="all",
        ),
    ],
)
def test_what_limits_the_clocks_is_named(fake_nvml: FakeNvml, lines: str, limits: list[str]) -> None:
    fake_nvml.write(ONE_GPU + lines)
    assert nvml_answer(fake_nvml, "nvml.state(UUID, counters=False).clock_limits") == limits


def test_a_driver_that_knows_the_call_by_its_older_name_alone_does_not_tell(fake_nvml: FakeNvml) -> None:
    without = "".join(line for line in LINES if not line.startswith("clock_reasons "))
    fake_nvml.write(without + "throttle_reasons 96\n")
    assert nvml_answer(fake_nvml, "nvml.state(UUID, counters=False).clock_limits") is None


@pytest.mark.parametrize("code", [4, 13, 999])
def test_a_gpu_that_tells_nothing_of_how_it_runs_still_tells_its_memory(
    fake_nvml: FakeNvml, code: int
) -> None:
    fake_nvml.write(ONE_GPU + f"state_error {code}\n")
    reading = nvml_answer(fake_nvml, "NvmlSource(nvml, UUID, pid=1).read(processes=False)")
    assert (reading["device_bytes"], reading["reason"], reading["gpu"]) == (1_000_000, None, UNKNOWN)


def test_a_call_too_new_for_the_driver_is_unknown_by_itself(fake_nvml: FakeNvml) -> None:
    """pynvml says so with an error that is no subclass of NVMLError."""
    script = """\
import pynvml

def too_new(handle):
    raise pynvml.NVMLLibraryMismatchError

pynvml.nvmlDeviceGetPowerUsage = too_new
with Nvml.open() as nvml:
    answer = nvml.state(UUID, counters=False)
"""
    assert answer_of(fake_nvml, script) == STATE | {"power_w": None}


@pytest.mark.parametrize(
    ("uuid", "lines", "reason"),
    [
        (GPU_UUID, "state_error 15\n", "the GPU is lost: it fell off the bus or hangs (see dmesg)"),
        ("GPU-0", "", "NVML knows no GPU of this UUID"),
    ],
)
def test_a_gpu_that_is_not_there_has_no_state(
    fake_nvml: FakeNvml, uuid: str, lines: str, reason: str
) -> None:
    fake_nvml.write(ONE_GPU + lines)
    script = f"""\
with Nvml.open() as nvml:
    try:
        answer = nvml.state({uuid!r}, counters=False)
    except NvmlUnavailable as error:
        answer = str(error)
"""
    assert answer_of(fake_nvml, script) == reason


@pytest.mark.parametrize("processes", [False, True])
def test_a_gpu_lost_between_two_calls_is_a_reason(fake_nvml: FakeNvml, processes: bool) -> None:
    fake_nvml.write(ONE_GPU + "state_error 15\n")
    reading = nvml_answer(fake_nvml, f"NvmlSource(nvml, UUID, pid=1).read({processes})")
    assert (reading["device_bytes"], reading["gpu"]) == (None, None)
    assert "the GPU is lost" in reading["reason"]


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("driver 1\n", "the NVIDIA driver is here, but no GPU"),
        ("init_error 9\n", "NVIDIA's library is here, but its kernel driver is not loaded"),
        ("init_error 18\n", "differ in version"),
        (ONE_GPU + "lost 1\n", "GPU 0: the GPU is lost"),
    ],
)
def test_why_nvml_cannot_be_used(fake_nvml: FakeNvml, state: str, reason: str) -> None:
    fake_nvml.write(state)
    assert reason in why_unavailable(fake_nvml)


def test_without_a_driver_library(fake_nvml: FakeNvml, tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").touch()  # found first and of no use, so a real one is not reached
    without = replace(fake_nvml, library_folder=tmp_path)
    assert why_unavailable(without) == "no NVIDIA driver library (libnvidia-ml.so.1) on this machine"


def test_samples_hold_device_bytes_and_edges_the_process_and_counters_too(fake_nvml: FakeNvml) -> None:
    fake_nvml.write(ONE_GPU + "process 4242 300\n")
    script = """\
with Nvml.open() as nvml, MemorySampler(NvmlSource(nvml, UUID, pid=4242), period_s=0.02) as sampler:
    wait_until(lambda: len(sampler.samples) >= 3)
    answer = [sampler.samples[0], sampler.edge(), sampler.latest.device_bytes]
"""
    sample, edge, latest_bytes = answer_of(fake_nvml, script)
    assert (sample["process_bytes"], sample["device_bytes"]) == (None, 1_000_000)
    assert (edge["process_bytes"], edge["device_bytes"], edge["reason"]) == (300, 1_000_000, None)
    assert (sample["gpu"], edge["gpu"]) == (STATE, STATE | COUNTERS)
    assert latest_bytes == 1_000_000
    assert edge["at_ns"] > sample["at_ns"]


def test_a_gpu_lost_while_sampling_becomes_a_reason(fake_nvml: FakeNvml) -> None:
    script = f"""\
with Nvml.open() as nvml, MemorySampler(NvmlSource(nvml, UUID, pid=1), period_s=0.02) as sampler:
    wait_until(lambda: sampler.latest)
    write_state({ONE_GPU + "lost 1"!r})
    wait_until(lambda: sampler.latest.reason)
    answer = [sampler.samples[0], sampler.latest, sampler.edge()]
"""
    before, after, edge = answer_of(fake_nvml, script)
    assert before["device_bytes"] == 1_000_000
    assert after["device_bytes"] is None
    assert "the GPU is lost" in after["reason"]
    assert "the GPU is lost" in edge["reason"]


@pytest.mark.slow
def test_sampling_keeps_its_period_and_costs_under_a_hundredth_of_a_core(fake_nvml: FakeNvml) -> None:
    script = """\
with Nvml.open() as nvml:
    sources = [NvmlSource(nvml, UUID, pid=1), ResidentSetSource(os.getpid())]
    with MemorySampler(sources[0]) as first, MemorySampler(sources[1]) as second:
        time.sleep(2.05)
    answer = [first.stats(), second.stats()]
"""
    answers = answer_of(fake_nvml, script)
    assert [stats["source"] for stats in answers] == ["nvml", "resident-set"]
    for stats in answers:
        assert stats["samples"] >= 15
        assert 0.1 <= stats["period_s"] < 0.13
        assert 0 < stats["cpu_s"] < 0.01 * stats["wall_s"]


def test_the_resident_set_shows_what_a_worker_allocates(fake_nvml: FakeNvml) -> None:
    script = """\
with worker, MemorySampler(ResidentSetSource(worker.pid), period_s=0.02) as sampler:
    wait_until(lambda: len(sampler.samples) >= 3)
    worker.stdin.write(b"\\n")
    worker.stdin.flush()
    worker.stdout.readline()
    edge, seen = sampler.edge(), len(sampler.samples)
    wait_until(lambda: len(sampler.samples) > seen + 1)
    answer = [sampler.samples[0], edge, sampler.latest]
    worker.kill()
"""
    before, edge, after = answer_of(fake_nvml, START_WORKER + script)
    for reading in (edge, after):
        assert reading["gpu"] is None
        assert 64_000_000 <= reading["process_bytes"] - before["process_bytes"] < 128_000_000
        assert reading["device_bytes"] is None
    assert edge["reason"] == "not on an NVIDIA GPU: resident set of the worker process"
    assert after["reason"] is None


def test_sampling_ends_with_the_worker_even_before_it_is_waited_for(fake_nvml: FakeNvml) -> None:
    script = """\
with worker, MemorySampler(ResidentSetSource(worker.pid), period_s=0.02) as sampler:
    wait_until(lambda: sampler.latest)
    worker.kill()
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    zombie = sampler.edge()
    time.sleep(0.1)
    seen = len(sampler.samples)
    time.sleep(0.1)
    worker.wait()
    least_bytes = min(sample.process_bytes for sample in sampler.samples)
    answer = [zombie, sampler.edge(), len(sampler.samples) - seen, least_bytes]
"""
    zombie, gone, more_samples, least_bytes = answer_of(fake_nvml, START_WORKER + script)
    assert zombie["reason"] == gone["reason"] == "the worker process has ended"
    assert zombie["process_bytes"] is None
    assert more_samples == 0
    assert least_bytes > 0


def test_nothing_here_imports_torch(fake_nvml: FakeNvml) -> None:
    assert nvml_answer(fake_nvml, "'torch' in sys.modules") is False
