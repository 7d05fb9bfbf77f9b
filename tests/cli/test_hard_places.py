"""Where a figure can't be had or is not the worker's alone: a flag in the record, a sentence, never a zero.

Through the fake NVML library and real parents and workers, as in test_gpu_story, whose players these are.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from analyses import memory_of, warnings_of
from fake_nvml import (  # noqa: F401
    GPU_UUID,
    ONE_GPU,
    FakeNvml,
    answer_of,
    fake_nvml_fixture,
    nvml_answer,
)
from played_worker import PARENT, ROOT, WHOLE_LIFE, WORKER, play
from sample_records import H100, MIB, edge, make_cell, make_ready, make_run, torch_memory

from orchestrator.analysis.memory.phases import phase_memory
from orchestrator.execution.idle_gpu import IdleGpu
from schemas.environment import Gpu
from schemas.frames import Done
from schemas.record import CellRecord, ForeignProcess, Leftover, MemoryReading, Run, SamplerStats

SLICE, NEIGHBOUR = (f"MIG-{number}1111111-2222-3333-4444-555555555555" for number in (7, 8))
ONE_SLICE = ONE_GPU + f"slice {SLICE}\ntotal 10000000000\nused 2000000\n"
TWO_SLICES = ONE_SLICE + f"slice {NEIGHBOUR}\ntotal 20000000000\nused 3000000\n"
LAST_SHOWN = "show(1700 * MIB, 1600 * MIB)"


def readings(cell: CellRecord) -> dict[str, MemoryReading]:
    return {edge.phase.name: edge.reading for edge in cell.edges if edge.reading}


def in_run(cell: CellRecord, **gpu: Any) -> Run:
    """A run of one cell, on a GPU like the one that the fake library plays."""
    run = make_run(cell)
    played = msgspec.structs.replace(H100, **({"uuid": GPU_UUID} | gpu))
    environment = msgspec.structs.replace(run.environment, gpus=[played])
    return msgspec.structs.replace(run, environment=environment)


# Another process on the GPU


def test_a_stranger_is_named_with_what_it_held(fake_nvml: FakeNvml, tmp_path: Path) -> None:
    strangers = f"process 17 {50 * MIB}\\nprocess 18 none\\n"
    life = WHOLE_LIFE.replace(LAST_SHOWN, f'show(1700 * MIB, 1600 * MIB, "{strangers}")')
    cell = play(fake_nvml, tmp_path, life)
    seen = readings(cell)
    assert seen["warmup"].others == []
    expected = [ForeignProcess(pid=17, used_bytes=50 * MIB), ForeignProcess(pid=18)]
    assert seen["decode"].others == expected
    assert seen["decode"].process_bytes == 1600 * MIB
    assert {sample.others for sample in cell.samples} == {None}  # who is there is asked at edges alone
    (line,) = warnings_of(make_run(cell))
    assert line.startswith("fp16: ")
    assert "pids 17, 18, at most 50 MiB plus an unknown amount at once" in line


def test_what_the_worker_started_is_no_stranger(fake_nvml: FakeNvml, tmp_path: Path) -> None:
    helper = 'import subprocess\nhelper = subprocess.Popen(["sleep", "30"])\n'
    shown = 'show(1700 * MIB, 1600 * MIB, f"process {helper.pid} 5000\\nprocess 17 1\\n")'
    cell = play(fake_nvml, tmp_path, helper + WHOLE_LIFE.replace(LAST_SHOWN, shown))
    assert readings(cell)["decode"].others == [ForeignProcess(pid=17, used_bytes=1)]


def cell_with(*others: list[ForeignProcess] | None) -> CellRecord:
    edges = [edge("decode", at_ns, process=9) for at_ns in range(len(others))]
    seen = [
        msgspec.structs.replace(each, reading=msgspec.structs.replace(each.reading, others=there))
        for each, there in zip(edges, others, strict=True)
    ]
    return make_cell(edges=seen)


@pytest.mark.parametrize(
    ("others", "told"),
    [
        pytest.param([None, []], None, id="nobody"),
        pytest.param([[(17, 5 * MIB)]], "pid 17, at most 5 MiB at once", id="one"),
        pytest.param([[(17, None)]], "pid 17, at most an unknown number of MiB at once", id="not told"),
        pytest.param(
            [[(17, 5 * MIB)], [], [(17, 6 * MIB), (18, 3 * MIB)], [(18, 8 * MIB)]],
            "pids 17, 18, at most 9 MiB at once",
            id="come and gone",
        ),
    ],
)
def test_strangers_are_told_once_a_cell(others: list[Any], told: str | None) -> None:
    there = [
        None if each is None else [ForeignProcess(pid=pid, used_bytes=used) for pid, used in each]
        for each in others
    ]
    lines = warnings_of(make_run(cell_with(*there)))
    assert len(lines) == (told is not None)
    assert told is None or told in lines[0]


# Hidden pids


def test_a_hidden_pid_leaves_an_estimate_that_says_so(fake_nvml: FakeNvml, tmp_path: Path) -> None:
    life = WHOLE_LIFE.replace("show(", "show_hidden(")
    hidden = 'def show_hidden(used, process):\n    show(used, None, "process 17 5\\n")\n'
    cell = play(fake_nvml, tmp_path, hidden + life)
    for reading in readings(cell).values():
        assert (reading.process_bytes, reading.others) == (None, None)  # 17 may be the worker itself
    assert memory_of(cell).nvml_peak_bytes is None
    phases = {phase.phase: phase for phase in phase_memory(cell)}
    assert phases["start"].device_over_baseline_bytes is None
    assert phases["load"].device_over_baseline_bytes == 1600 * MIB - 1_000_000
    (line,) = warnings_of(make_run(cell))
    assert "a container hides pids" in line
    assert "up to 1,699 MiB more than just before" in line


def test_the_estimate_is_the_highest_of_a_precisions_cells() -> None:
    """What the profiler held is in none of them."""

    def cell(device: int) -> CellRecord:
        edges = [edge("load", 0), edge("warmup", 1, device=device * MIB, reason="hidden")]
        edges += [edge("profile", 2, device=device * MIB), edge("end", 3, device=9000 * MIB)]
        return make_cell(edges=edges, baseline_device_bytes=100 * MIB)

    (line,) = warnings_of(make_run(cell(300), cell(700)))
    assert "up to 600 MiB more" in line


# A GPU that does not become empty again


THREE_WORKERS = (
    PARENT.partition("with Nvml.open()")[0]
    + """
import os, threading
from orchestrator.execution.idle_gpu import IdleGpu

def empty_the_gpu(text):
    state = Path(os.environ["FAKE_NVML_STATE"])
    draft = state.with_suffix(".parent-draft")
    draft.write_text(text)
    draft.replace(state)

records = []
with Nvml.open() as nvml:
    idle = IdleGpu(nvml)
    idle.patience_s = {patience_s}
    for _ in range({workers}):
        context = RunContext(folder, watcher, nvml, idle, Path(lent), timeout_s=30)
        with CellWorker(cell, context) as worker:
            records.append(worker.measure(cell))
        if {empties}:
            threading.Timer(0.4, empty_the_gpu, [{idle_state!r}]).start()
print(msgspec.json.encode(records).decode())
"""
)


def play_several(
    fake: FakeNvml, folder: Path, life: str, workers: int, patience_s: float, empties: bool = False
) -> list[CellRecord]:
    (folder / "workers").mkdir()
    (folder / "workers" / "__init__.py").touch()
    (folder / "workers" / "play.py").write_text(WORKER + life)
    start, end = THREE_WORKERS.split("records = []")
    fields = {"patience_s": patience_s, "workers": workers, "empties": empties, "idle_state": ONE_GPU}
    script = start + "records = []" + end.format(**fields)
    argv = [sys.executable, "-c", script, sys.executable, str(folder), str(folder / "run")]
    done = subprocess.run(argv, cwd=ROOT, env=fake.env(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return msgspec.json.decode(done.stdout, type=list[CellRecord])


def test_what_a_worker_left_behind_is_waited_for_once_and_told(fake_nvml: FakeNvml, tmp_path: Path) -> None:
    first, second, third = play_several(fake_nvml, tmp_path, WHOLE_LIFE, workers=3, patience_s=0.3)
    assert first.leftover is None
    assert second.leftover is not None
    assert third.leftover is not None
    assert first.ready is not None
    assert second.leftover.over_baseline_bytes == 1700 * MIB - 1_000_000
    assert second.leftover.holders == [ForeignProcess(pid=first.ready.pid, used_bytes=1600 * MIB)]
    assert 0.3 <= second.leftover.waited_s < 1
    assert third.leftover.waited_s < 0.1
    assert second.baseline_device_bytes == 1700 * MIB
    (line,) = warnings_of(make_run(second))
    assert line.startswith("fp16: ")
    assert "1,699 MiB more " in line
    assert f"(NVML lists pid {first.ready.pid})" in line


def test_memory_that_comes_back_late_is_no_leftover(fake_nvml: FakeNvml, tmp_path: Path) -> None:
    both = play_several(fake_nvml, tmp_path, WHOLE_LIFE, workers=2, patience_s=10, empties=True)
    assert [cell.leftover for cell in both] == [None, None]
    assert [cell.baseline_device_bytes for cell in both] == [1_000_000, 1_000_000]


IDLE = """\
from orchestrator.execution.idle_gpu import IdleGpu
from sample_records import make_ready
"""


def idle_answer(fake: FakeNvml, state: str, noted: bool = True) -> Any:
    """[leftover, seconds waited for it] of a GPU that is in `state` after a worker was on it."""
    script = f"""\
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
{IDLE}
with Nvml.open() as nvml:
    idle = IdleGpu(nvml)
    idle.patience_s = 0.2
    if {noted}:
        idle.note(make_ready(UUID))
    write_state({state!r})
    began_s = time.monotonic()
    answer = [idle.wait(), time.monotonic() - began_s]
"""
    return answer_of(fake, script)


@pytest.mark.parametrize(
    ("state", "noted"),
    [
        pytest.param(ONE_GPU, True, id="as before"),
        pytest.param(ONE_GPU.replace("used 1000000", f"used {20 * MIB}"), True, id="some MiB of the driver"),
        pytest.param(ONE_GPU.replace("used 1000000", "used 900000000"), False, id="whichever GPU it is"),
        pytest.param(ONE_GPU + "lost 1\n", True, id="lost"),
    ],
)
def test_the_first_look_decides(fake_nvml: FakeNvml, state: str, noted: bool) -> None:
    leftover, waited_s = idle_answer(fake_nvml, state, noted)
    assert leftover is None
    assert waited_s < 0.1


@pytest.mark.parametrize(
    ("lines", "holders"),
    [("", []), ("process_error 13\n", None), ("process 17 none\n", [{"pid": 17, "used_bytes": None}])],
)
def test_who_holds_what_is_left(fake_nvml: FakeNvml, lines: str, holders: list[Any] | None) -> None:
    leftover, _ = idle_answer(fake_nvml, ONE_GPU.replace("used 1000000", "used 900000000") + lines)
    assert leftover["over_baseline_bytes"] == 899_000_000
    assert leftover["holders"] == holders


def test_without_nvml_there_is_nothing_to_wait_for() -> None:
    idle = IdleGpu(None)
    idle.note(make_ready())
    assert idle.wait() is None


@pytest.mark.parametrize(
    ("holders", "told"),
    [
        (None, "NVML did not list the processes that hold it"),
        ([], "NVML lists no process"),
        ([ForeignProcess(pid=17), ForeignProcess(pid=18)], "NVML lists pids 17, 18"),
    ],
)
def test_a_leftover_is_told_once_per_precision(holders: list[ForeignProcess] | None, told: str) -> None:
    left = Leftover(over_baseline_bytes=900 * MIB, waited_s=10, holders=holders)
    (line,) = warnings_of(make_run(make_cell(leftover=left), make_cell(leftover=left)))
    assert "900 MiB more " in line
    assert f"than before the run ({told})" in line


# MIG


@pytest.mark.parametrize(
    ("state", "told", "visible", "found"),
    [
        pytest.param(ONE_GPU, GPU_UUID, None, GPU_UUID, id="no MIG"),
        pytest.param(ONE_GPU + "mig 1\n", GPU_UUID, None, GPU_UUID, id="MIG mode without a slice"),
        pytest.param(TWO_SLICES, "GPU-" + SLICE[4:], None, SLICE, id="torch tells the slice"),
        pytest.param(ONE_SLICE, GPU_UUID, None, SLICE, id="there is only one"),
        pytest.param(TWO_SLICES, GPU_UUID, NEIGHBOUR, NEIGHBOUR, id="the variable names it"),
        pytest.param(TWO_SLICES, GPU_UUID, f"0,{SLICE}", SLICE, id="beside a number"),
        pytest.param(TWO_SLICES, GPU_UUID, f"{SLICE},{NEIGHBOUR}", GPU_UUID, id="one of two"),
        pytest.param(TWO_SLICES, GPU_UUID, "MIG-gone", GPU_UUID, id="the variable names nothing"),
        pytest.param(TWO_SLICES, GPU_UUID, None, GPU_UUID, id="not to be told"),
    ],
)
def test_which_slice_a_worker_is_in(
    fake_nvml: FakeNvml, state: str, told: str, visible: str | None, found: str
) -> None:
    fake_nvml.write(state)
    assert nvml_answer(fake_nvml, f"nvml.uuid_of({told!r}, {visible!r})") == found


def test_a_slice_has_its_own_memory_and_the_whole_gpus_clocks(fake_nvml: FakeNvml) -> None:
    fake_nvml.write(TWO_SLICES + "process 17 5\n")
    expression = (
        "[nvml.uuids(), [nvml.device_bytes(uuid) for uuid in nvml.uuids()], "
        "[nvml.processes(uuid) for uuid in nvml.uuids()], nvml.state(nvml.uuids()[1], False), nvml.gpus()]"
    )
    uuids, sizes, processes, state, gpus = nvml_answer(fake_nvml, expression)
    assert uuids == [GPU_UUID, SLICE, NEIGHBOUR]
    assert sizes == [1_000_000, 2_000_000, 3_000_000]
    assert processes == [[], [], [[17, 5]]]
    assert state["sm_clock_mhz"] == 1980
    (gpu,) = msgspec.convert(gpus, list[Gpu])
    assert (gpu.uuid, gpu.mig, gpu.memory_bytes) == (GPU_UUID, True, 85_899_345_920)


def test_without_privileges_the_slices_still_tell(fake_nvml: FakeNvml) -> None:
    fake_nvml.write(TWO_SLICES.replace("used 1000000", "used 1000000\nmemory_error 4"))
    gpus, found = nvml_answer(fake_nvml, f"[nvml.gpus(), nvml.uuid_of({GPU_UUID!r}, {SLICE!r})]")
    assert [(gpu["memory_bytes"], gpu["mig"]) for gpu in gpus] == [(20_000_000_000, True)]
    assert found == SLICE


@pytest.mark.parametrize("refused", [False, True])
def test_a_worker_in_a_slice_is_measured_there(fake_nvml: FakeNvml, tmp_path: Path, refused: bool) -> None:
    whole = "memory_error 4\n" if refused else ""
    fake_nvml.write(TWO_SLICES.replace(f"slice {SLICE}", whole + f"slice {SLICE}"))
    in_slice = f"""
def show_slice(used, process):
    line = f"used {{used}}\\nprocess {{os.getpid()}} {{process}}\\n"
    show(7, None, {whole!r} + "slice {SLICE}\\n" + line + "slice {NEIGHBOUR}\\n")

def ready_in_slice():
    say("ready", pid=os.getpid(), at_ns=time.monotonic_ns(), python="3.12", versions={{"torch": "2"}},
        device="cuda:0", device_name="Fake H100 MIG 1g.10gb", device_uuid={GPU_UUID!r},
        cuda_visible_devices={SLICE!r}, cuda_device_order="PCI_BUS_ID")
"""
    life = WHOLE_LIFE.replace("show(", "show_slice(").replace("ready()", "ready_in_slice()")
    cell = play(fake_nvml, tmp_path, in_slice + life)
    assert isinstance(cell.outcome, Done)
    assert cell.ready is not None
    assert (cell.ready.cuda_visible_devices, cell.ready.cuda_device_order) == (SLICE, "PCI_BUS_ID")
    assert (cell.nvml_uuid, cell.baseline_device_bytes) == (SLICE, 2_000_000)
    decode = readings(cell)["decode"]
    assert (decode.process_bytes, decode.device_bytes) == (1600 * MIB, 1700 * MIB)
    assert decode.gpu is not None
    assert decode.gpu.sm_clock_mhz == 1980
    (line,) = warnings_of(in_run(cell, mig=True))
    assert line.startswith(f"the workers ran in a MIG slice ({SLICE}): NVML's device bytes are the slice's")


def test_an_unknown_slice_makes_it_the_whole_gpus_memory() -> None:
    cell = make_cell(nvml_uuid=GPU_UUID, ready=make_ready(GPU_UUID))
    (line,) = warnings_of(in_run(cell, mig=True))
    assert "NVML's device bytes are the whole GPU's, including other slices" in line
    assert warnings_of(in_run(cell)) == []


# Old drivers, and numbers that differ


def test_a_v1_only_driver_is_said_to_count_its_own_in(fake_nvml: FakeNvml, tmp_path: Path) -> None:
    fake_nvml.write(ONE_GPU + "memory_info_version 1\n")
    show_old = 'def show_old(used, process):\n    show(used, process, "memory_info_version 1\\n")\n'
    cell = play(fake_nvml, tmp_path, show_old + WHOLE_LIFE.replace("show(", "show_old("))
    assert cell.baseline_device_bytes == 501_000_000
    assert readings(cell)["decode"].device_bytes == 1700 * MIB + 500_000_000
    assert warnings_of(in_run(cell)) == []
    (line,) = warnings_of(in_run(cell, memory_info_version=1))
    assert line.startswith("the driver is too old to report the memory it reserves for itself")


@pytest.mark.parametrize(
    ("device", "variables", "told"),
    [
        ("cuda:1", {}, None),
        ("cuda:0", {"cuda_visible_devices": "1"}, "CUDA_VISIBLE_DEVICES=1"),
        ("cuda:0", {}, "CUDA numbers the fastest first"),
        (
            "cuda:0",
            {"cuda_visible_devices": GPU_UUID, "cuda_device_order": "PCI_BUS_ID"},
            f"CUDA_VISIBLE_DEVICES={GPU_UUID}, CUDA_DEVICE_ORDER=PCI_BUS_ID",
        ),
    ],
)
def test_cudas_number_and_nvmls_are_told_apart(
    device: str, variables: dict[str, str], told: str | None
) -> None:
    ready = msgspec.structs.replace(make_ready(GPU_UUID), device=device, **variables)
    lines = warnings_of(in_run(make_cell(ready=ready), index=1))
    assert lines == ([] if told is None else [f"{device} is GPU 1 in NVML and nvidia-smi ({told})"])


def test_a_worker_tells_what_cuda_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.generation.device import Device
    from workers.harness.ready import ready_frame

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    ready = ready_frame(Device("cpu"), {})
    assert (ready.cuda_visible_devices, ready.cuda_device_order) == ("2,0", None)


# The sampler's own account


def test_slow_calls_are_timed_and_missed_samples_counted(fake_nvml: FakeNvml) -> None:
    fake_nvml.write(ONE_GPU + "slow_us 200000\n")
    script = """\
with Nvml.open() as nvml, MemorySampler(NvmlSource(nvml, UUID, pid=1), period_s=0.05) as sampler:
    wait_until(lambda: len(sampler.samples) >= 3)
    sampler.edge()
    sampler.edge()
    answer = sampler.stats()
"""
    stats = answer_of(fake_nvml, script)
    assert 0.2 <= stats["median_call_s"] <= stats["longest_call_s"] < 2
    assert stats["missed"] >= 2 * 4
    assert stats["enumerations"] == 2


def test_no_one_samples_more_than_twenty_times_a_second(fake_nvml: FakeNvml) -> None:
    script = """\
with Nvml.open() as nvml, MemorySampler(NvmlSource(nvml, UUID, pid=1), period_s=0.001) as sampler:
    wait_until(lambda: len(sampler.samples) >= 4)
    answer = sampler.stats()
"""
    assert answer_of(fake_nvml, script)["period_s"] >= 0.05


def test_a_resident_set_lists_no_processes(fake_nvml: FakeNvml) -> None:
    script = """\
with MemorySampler(ResidentSetSource(os.getpid())) as sampler:
    wait_until(lambda: sampler.latest)
    reading = sampler.edge()
    answer = [sampler.stats(), reading.others]
"""
    stats, others = answer_of(fake_nvml, script)
    assert (stats["enumerations"], others) == (0, None)


def stats(**fields: Any) -> SamplerStats:
    return SamplerStats(source="nvml", samples=100, period_s=0.1, cpu_s=0.0, wall_s=10.0, **fields)


@pytest.mark.parametrize(
    ("fields", "warned"),
    [({}, False), ({"missed": 10}, False), ({"missed": 11, "longest_call_s": 0.5}, True)],
)
def test_many_missed_samples_are_told(fields: dict[str, Any], warned: bool) -> None:
    lines = warnings_of(make_run(make_cell(sampler=stats(**fields))))
    assert len(lines) == warned
    for line in lines:
        assert line.startswith("fp16: 11 memory samples were missed and 100 taken, the slowest in 500 ms: ")


# Old records


def test_records_of_before_still_decode() -> None:
    cell = make_cell(edges=[edge("load", 0, torch=torch_memory(1), device=5)], sampler=stats())
    plain = json.loads(msgspec.json.encode(cell))
    for name in ("leftover", "nvml_uuid"):
        del plain[name]
    for name in ("cuda_visible_devices", "cuda_device_order"):
        del plain["ready"][name]
    for name in ("median_call_s", "longest_call_s", "missed", "enumerations"):
        del plain["sampler"][name]
    del plain["edges"][0]["reading"]["others"]
    assert msgspec.convert(plain, CellRecord) == cell
    assert warnings_of(make_run(cell)) == []
