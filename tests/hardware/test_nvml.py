"""NVML, called through pynvml into a fake driver library.

Every test runs a fresh Python process, because a process loads `libnvidia-ml.so.1` only once. Its script
assigns the result to `answer`, which is returned as JSON.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from fake_nvml import (
    COUNTERS,
    GPU_UUID,
    ONE_GPU,
    START_WATCHED,
    STATE,
    FakeNvml,
    answer_of,
    nvml_answer,
)
from golden_text import Golden

OTHER_UUID = "GPU-99999999-2222-3333-4444-555555555555"
LINES = ONE_GPU.splitlines(keepends=True)
UNKNOWN = dict.fromkeys(STATE, None)


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


def test_old_drivers_use_memory_info_v1(fake_nvml: FakeNvml) -> None:
    fake_nvml.write("memory_info_version 1\n" + ONE_GPU)
    answer = nvml_answer(fake_nvml, "[nvml.gpus()[0].memory_info_version, nvml.device_bytes(UUID)]")
    assert answer == [1, 501_000_000]


def test_gpus_are_addressed_by_uuid_not_index(fake_nvml: FakeNvml) -> None:
    fake_nvml.write(f"driver 1\ndevice {OTHER_UUID} Another\nused 7\n" + ONE_GPU)
    answer = nvml_answer(fake_nvml, f"[nvml.device_bytes(UUID), nvml.device_bytes({OTHER_UUID!r})]")
    assert answer == [1_000_000, 7]


def test_an_unreadable_gpu_is_left_out(fake_nvml: FakeNvml) -> None:
    fake_nvml.write(f"device {OTHER_UUID} Broken\nlost 1\n" + ONE_GPU)
    assert nvml_answer(fake_nvml, "[(gpu.index, gpu.uuid) for gpu in nvml.gpus()]") == [[1, GPU_UUID]]


def test_an_unknown_uuid_is_an_error(golden: Golden, fake_nvml: FakeNvml) -> None:
    script = """\
with Nvml.open() as nvml:
    try:
        nvml.device_bytes("GPU-0")
    except NvmlUnavailable as error:
        answer = str(error)
"""
    golden(answer_of(fake_nvml, script))


@pytest.mark.parametrize(
    ("lines", "used_bytes"),
    [
        pytest.param("process 4242 300\n", 300, id="listed"),
        pytest.param("process 4242 300\nprocess 4242 40\n", 340, id="listed twice"),
        pytest.param("process 4242 none\n", None, id="not reported"),
        pytest.param("process 17 300\n", None, id="hidden pid"),
        pytest.param("", None, id="no process"),
        pytest.param("process_error 13\n", None, id="library mismatch"),
        pytest.param("process_error 4\n", None, id="refused"),
    ],
)
def test_process_bytes_or_a_reason(
    golden: Golden, fake_nvml: FakeNvml, lines: str, used_bytes: int | None
) -> None:
    fake_nvml.write(ONE_GPU + lines)
    script = """\
with Nvml.open() as nvml:
    reading = NvmlSource(nvml, UUID, 4242).read(processes=True)
    answer = [reading.process_bytes, reading.reason]
"""
    found_bytes, why = answer_of(fake_nvml, script)
    assert found_bytes == used_bytes
    assert (why is None) == (used_bytes is not None)
    if why is not None:
        golden(why)


def test_all_processes_are_listed(fake_nvml: FakeNvml) -> None:
    fake_nvml.write(ONE_GPU + "process 17 5000\nprocess 18 none\n")
    assert nvml_answer(fake_nvml, "nvml.processes(UUID)") == [[17, 5000], [18, None]]


def test_a_live_worker_is_found_by_its_command_line(fake_nvml: FakeNvml) -> None:
    fake_nvml.write(ONE_GPU + "processes_auto 612000000\n")
    script = """\
with Nvml.open() as nvml, worker:
    reading = NvmlSource(nvml, UUID, worker.pid).read(processes=True)
    answer = [reading.process_bytes, reading.reason]
    worker.kill()
"""
    assert answer_of(fake_nvml, START_WATCHED + script) == [612_000_000, None]


def test_gpu_state_with_and_without_counters(fake_nvml: FakeNvml) -> None:
    answer = nvml_answer(fake_nvml, "[nvml.state(UUID, counters) for counters in (False, True)]")
    assert answer == [STATE, STATE | COUNTERS]


def test_an_unsupported_figure_is_none_and_the_others_remain(fake_nvml: FakeNvml) -> None:
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
def test_clock_limits_are_named(fake_nvml: FakeNvml, lines: str, limits: list[str]) -> None:
    fake_nvml.write(ONE_GPU + lines)
    assert nvml_answer(fake_nvml, "nvml.state(UUID, counters=False).clock_limits") == limits


def test_clock_limits_are_unknown_to_drivers_before_535(fake_nvml: FakeNvml) -> None:
    without = "".join(line for line in LINES if not line.startswith("clock_reasons "))
    fake_nvml.write(without + "throttle_reasons 96\n")
    assert nvml_answer(fake_nvml, "nvml.state(UUID, counters=False).clock_limits") is None


@pytest.mark.parametrize("code", [4, 13, 999])
def test_memory_is_read_even_if_the_state_is_refused(fake_nvml: FakeNvml, code: int) -> None:
    fake_nvml.write(ONE_GPU + f"state_error {code}\n")
    reading = nvml_answer(fake_nvml, "NvmlSource(nvml, UUID, pid=1).read(processes=False)")
    assert (reading["device_bytes"], reading["reason"], reading["gpu"]) == (1_000_000, None, UNKNOWN)


def test_a_call_newer_than_the_driver_gives_none(fake_nvml: FakeNvml) -> None:
    """In that case pynvml raises an error that is not a subclass of NVMLError."""
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
    ("uuid", "lines"), [pytest.param(GPU_UUID, "state_error 15\n", id="lost"), ("GPU-0", "")]
)
def test_reading_the_state_of_a_missing_gpu_is_an_error(
    golden: Golden, fake_nvml: FakeNvml, uuid: str, lines: str
) -> None:
    fake_nvml.write(ONE_GPU + lines)
    script = f"""\
with Nvml.open() as nvml:
    try:
        answer = nvml.state({uuid!r}, counters=False)
    except NvmlUnavailable as error:
        answer = str(error)
"""
    golden(answer_of(fake_nvml, script))


@pytest.mark.parametrize("processes", [False, True])
def test_a_gpu_lost_between_two_calls_gives_a_reason(
    golden: Golden, fake_nvml: FakeNvml, processes: bool
) -> None:
    fake_nvml.write(ONE_GPU + "state_error 15\n")
    reading = nvml_answer(fake_nvml, f"NvmlSource(nvml, UUID, pid=1).read({processes})")
    assert (reading["device_bytes"], reading["gpu"]) == (None, None)
    golden(reading["reason"])


@pytest.mark.parametrize(
    "state",
    [
        pytest.param("driver 1\n", id="no GPU"),
        pytest.param("init_error 9\n", id="no kernel driver"),
        pytest.param("init_error 18\n", id="version mismatch"),
        pytest.param(ONE_GPU + "lost 1\n", id="lost"),
    ],
)
def test_why_nvml_is_unavailable(golden: Golden, fake_nvml: FakeNvml, state: str) -> None:
    fake_nvml.write(state)
    golden(why_unavailable(fake_nvml))


def test_without_a_driver_library(golden: Golden, fake_nvml: FakeNvml, tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").touch()  # invalid, and found before any real one
    without = replace(fake_nvml, library_folder=tmp_path)
    golden(why_unavailable(without))


def test_nvml_does_not_import_torch(fake_nvml: FakeNvml) -> None:
    assert nvml_answer(fake_nvml, "'torch' in sys.modules") is False
