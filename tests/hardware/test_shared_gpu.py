"""Memory on the GPU that is not the worker's: other processes, hidden pids, and what earlier workers left.

Each is a flag in the record and a sentence in the report, never a zero. With the fake driver library, and
real parents and workers, as in test_gpu_story.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from analyses import memory_of, warnings_of
from fake_nvml import (
    ONE_GPU,
    FakeNvml,
    answer_of,
)
from fake_worker import FULL_RUN, PARENT, ROOT, WORKER, run_fake_worker
from golden_text import Golden
from sample_records import MIB, edge, make_cell, make_ready, make_run

from orchestrator.analysis.memory.phases import phase_memory
from orchestrator.execution.idle_gpu import IdleGpu
from schemas.record import CellRecord, ForeignProcess, Leftover, MemoryReading

LAST_SHOWN = "show(1700 * MIB, 1600 * MIB)"


def readings(cell: CellRecord) -> dict[str, MemoryReading]:
    return {edge.phase.name: edge.reading for edge in cell.edges if edge.reading}


def test_other_processes_are_listed_with_their_memory(
    golden: Golden, fake_nvml: FakeNvml, tmp_path: Path
) -> None:
    others = f"process 17 {50 * MIB}\\nprocess 18 none\\n"
    script = FULL_RUN.replace(LAST_SHOWN, f'show(1700 * MIB, 1600 * MIB, "{others}")')
    cell = run_fake_worker(fake_nvml, tmp_path, script)
    seen = readings(cell)
    assert seen["warmup"].others == []
    expected = [ForeignProcess(pid=17, used_bytes=50 * MIB), ForeignProcess(pid=18)]
    assert seen["decode"].others == expected
    assert seen["decode"].process_bytes == 1600 * MIB
    assert {sample.others for sample in cell.samples} == {None}  # only edges list processes
    (line,) = warnings_of(make_run(cell))
    assert "17, 18" in line
    golden(line)


def test_child_processes_of_the_worker_are_not_listed_as_others(fake_nvml: FakeNvml, tmp_path: Path) -> None:
    helper = 'import subprocess\nhelper = subprocess.Popen(["sleep", "30"])\n'
    shown = 'show(1700 * MIB, 1600 * MIB, f"process {helper.pid} 5000\\nprocess 17 1\\n")'
    cell = run_fake_worker(fake_nvml, tmp_path, helper + FULL_RUN.replace(LAST_SHOWN, shown))
    assert readings(cell)["decode"].others == [ForeignProcess(pid=17, used_bytes=1)]


def cell_with(*others: list[ForeignProcess] | None) -> CellRecord:
    edges = [edge("decode", at_ns, process=9) for at_ns in range(len(others))]
    seen = [
        msgspec.structs.replace(each, reading=msgspec.structs.replace(each.reading, others=there))
        for each, there in zip(edges, others, strict=True)
    ]
    return make_cell(edges=seen)


@pytest.mark.parametrize(
    ("others", "warned"),
    [
        pytest.param([None, []], False, id="none"),
        pytest.param([[(17, 5 * MIB)]], True, id="one"),
        pytest.param([[(17, None)]], True, id="unknown size"),
        pytest.param(
            [[(17, 5 * MIB)], [], [(17, 6 * MIB), (18, 3 * MIB)], [(18, 8 * MIB)]],
            True,
            id="one after another",
        ),
    ],
)
def test_one_warning_per_cell_about_other_processes(golden: Golden, others: list[Any], warned: bool) -> None:
    there = [
        None if each is None else [ForeignProcess(pid=pid, used_bytes=used) for pid, used in each]
        for each in others
    ]
    lines = warnings_of(make_run(cell_with(*there)))
    assert len(lines) == warned
    if warned:
        golden(lines)


def test_with_hidden_pids_there_is_only_an_estimate(
    golden: Golden, fake_nvml: FakeNvml, tmp_path: Path
) -> None:
    script = FULL_RUN.replace("show(", "show_hidden(")
    hidden = 'def show_hidden(used, process):\n    show(used, None, "process 17 5\\n")\n'
    cell = run_fake_worker(fake_nvml, tmp_path, hidden + script)
    for reading in readings(cell).values():
        assert (reading.process_bytes, reading.others) == (None, None)  # 17 may be the worker itself
    assert memory_of(cell).nvml_peak_bytes is None
    phases = {phase.phase: phase for phase in phase_memory(cell)}
    assert phases["start"].device_over_baseline_bytes is None
    assert phases["load"].device_over_baseline_bytes == 1600 * MIB - 1_000_000
    (line,) = warnings_of(make_run(cell))
    assert "1,699 MiB" in line
    golden(re.sub(r"process \d+", "process PID", line))


def test_the_estimate_is_the_highest_of_all_cells_without_the_profiler() -> None:

    def cell(device: int) -> CellRecord:
        edges = [edge("load", 0), edge("warmup", 1, device=device * MIB, reason="hidden")]
        edges += [edge("profile", 2, device=device * MIB), edge("end", 3, device=9000 * MIB)]
        return make_cell(edges=edges, baseline_device_bytes=100 * MIB)

    (line,) = warnings_of(make_run(cell(300), cell(700)))
    assert "600 MiB" in line


THREE_WORKERS = (
    PARENT.partition("with Nvml.open()")[0]
    + """
import os, threading

def empty_the_gpu(text):
    state = Path(os.environ["FAKE_NVML_STATE"])
    draft = state.with_suffix(".parent-draft")
    draft.write_text(text)
    draft.replace(state)

records = []
with Nvml.open() as nvml:
    idle = IdleGpu(nvml)
    idle.patience_s = {patience_s}
    context = RunContext(folder, watcher, nvml, idle, Path(lent), timeout_s=30)
    for _ in range({workers}):
        with CellWorker(cell, context) as worker:
            records.append(worker.measure(cell))
        if {empties}:
            threading.Timer(0.4, empty_the_gpu, [{idle_state!r}]).start()
print(msgspec.json.encode(records).decode())
"""
)


def run_several(
    fake: FakeNvml, folder: Path, script: str, workers: int, patience_s: float, empties: bool = False
) -> list[CellRecord]:
    (folder / "workers").mkdir()
    (folder / "workers" / "__init__.py").touch()
    (folder / "workers" / "fake.py").write_text(WORKER + script)
    start, end = THREE_WORKERS.split("records = []")
    fields = {"patience_s": patience_s, "workers": workers, "empties": empties, "idle_state": ONE_GPU}
    script = start + "records = []" + end.format(**fields)
    argv = [sys.executable, "-c", script, sys.executable, str(folder), str(folder / "run")]
    done = subprocess.run(argv, cwd=ROOT, env=fake.env(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return msgspec.json.decode(done.stdout, type=list[CellRecord])


def test_leftover_memory_is_waited_for_once_and_recorded(
    golden: Golden, fake_nvml: FakeNvml, tmp_path: Path
) -> None:
    first, second, third = run_several(fake_nvml, tmp_path, FULL_RUN, workers=3, patience_s=2)
    assert first.leftover is None
    assert second.leftover is not None
    assert third.leftover is not None
    assert first.ready is not None
    assert second.leftover.over_baseline_bytes == 1700 * MIB - 1_000_000
    assert second.leftover.holders == [ForeignProcess(pid=first.ready.pid, used_bytes=1600 * MIB)]
    assert third.leftover.waited_s < 2 <= second.leftover.waited_s
    assert second.baseline_device_bytes == 1700 * MIB
    (line,) = warnings_of(make_run(second))
    golden(line.replace(str(first.ready.pid), "PID"))


def test_memory_that_is_freed_late_is_not_leftover(fake_nvml: FakeNvml, tmp_path: Path) -> None:
    both = run_several(fake_nvml, tmp_path, FULL_RUN, workers=2, patience_s=10, empties=True)
    assert [cell.leftover for cell in both] == [None, None]
    assert [cell.baseline_device_bytes for cell in both] == [1_000_000, 1_000_000]


IDLE = """\
from orchestrator.execution.idle_gpu import IdleGpu
from sample_records import make_ready
"""


def leftover_of(fake: FakeNvml, state: str, patience_s: float, noted: bool = True) -> Any:
    """The leftover memory of a GPU that is in `state` after a worker used it."""
    script = f"""\
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
{IDLE}
with Nvml.open() as nvml:
    idle = IdleGpu(nvml)
    idle.patience_s = {patience_s}
    if {noted}:
        idle.note(make_ready(UUID))
    write_state({state!r})
    answer = idle.wait()
"""
    return answer_of(fake, script)


@pytest.mark.parametrize(
    ("state", "noted"),
    [
        pytest.param(ONE_GPU, True, id="as before"),
        pytest.param(
            ONE_GPU.replace("used 1000000", f"used {20 * MIB}"), True, id="a few MiB of the driver's"
        ),
        pytest.param(ONE_GPU.replace("used 1000000", "used 900000000"), False, id="no worker was on it"),
        pytest.param(ONE_GPU + "lost 1\n", True, id="lost"),
    ],
)
def test_an_empty_gpu_is_not_waited_for(fake_nvml: FakeNvml, state: str, noted: bool) -> None:
    # Waiting would exceed the time limit of `answer_of`.
    assert leftover_of(fake_nvml, state, patience_s=600, noted=noted) is None


@pytest.mark.parametrize(
    ("lines", "holders"),
    [("", []), ("process_error 13\n", None), ("process 17 none\n", [{"pid": 17, "used_bytes": None}])],
)
def test_holders_of_leftover_memory(fake_nvml: FakeNvml, lines: str, holders: list[Any] | None) -> None:
    state = ONE_GPU.replace("used 1000000", "used 900000000") + lines
    leftover = leftover_of(fake_nvml, state, patience_s=0.2)
    assert leftover["over_baseline_bytes"] == 899_000_000
    assert leftover["holders"] == holders


def test_without_nvml_nothing_is_waited_for() -> None:
    idle = IdleGpu(None)
    idle.note(make_ready())
    assert idle.wait() is None


@pytest.mark.parametrize(
    "holders",
    [
        pytest.param(None, id="refused"),
        pytest.param([], id="none"),
        pytest.param([ForeignProcess(pid=17), ForeignProcess(pid=18)], id="two"),
    ],
)
def test_one_warning_per_precision_about_leftover_memory(
    golden: Golden, holders: list[ForeignProcess] | None
) -> None:
    left = Leftover(over_baseline_bytes=900 * MIB, waited_s=10, holders=holders)
    (line,) = warnings_of(make_run(make_cell(leftover=left), make_cell(leftover=left)))
    assert "900 MiB" in line
    assert all(str(each.pid) in line for each in holders or [])
    golden(line)
