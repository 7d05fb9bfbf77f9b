"""MIG slices, old drivers, and GPUs that CUDA and NVML number differently.

With the fake driver library, and real parents and workers, as in test_gpu_story.
"""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from analyses import warnings_of
from fake_nvml import (
    GPU_UUID,
    ONE_GPU,
    FakeNvml,
    nvml_answer,
)
from fake_worker import FULL_RUN, run_fake_worker
from golden_text import Golden
from sample_records import H100, MIB, make_cell, make_ready, make_run

from schemas.environment import Gpu
from schemas.frames import Done
from schemas.record import CellRecord, MemoryReading, Run

SLICE, NEIGHBOR = (f"MIG-{number}1111111-2222-3333-4444-555555555555" for number in (7, 8))
ONE_SLICE = ONE_GPU + f"slice {SLICE}\ntotal 10000000000\nused 2000000\n"
TWO_SLICES = ONE_SLICE + f"slice {NEIGHBOR}\ntotal 20000000000\nused 3000000\n"


def readings(cell: CellRecord) -> dict[str, MemoryReading]:
    return {edge.phase.name: edge.reading for edge in cell.edges if edge.reading}


def in_run(cell: CellRecord, **gpu: Any) -> Run:
    """A run of one cell, on a GPU like the fake library's."""
    run = make_run(cell)
    played = msgspec.structs.replace(H100, **({"uuid": GPU_UUID} | gpu))
    environment = msgspec.structs.replace(run.environment, gpus=[played])
    return msgspec.structs.replace(run, environment=environment)


@pytest.mark.parametrize(
    ("state", "torch_uuid", "visible", "found"),
    [
        pytest.param(ONE_GPU, GPU_UUID, None, GPU_UUID, id="no MIG"),
        pytest.param(ONE_GPU + "mig 1\n", GPU_UUID, None, GPU_UUID, id="MIG mode without a slice"),
        pytest.param(TWO_SLICES, "GPU-" + SLICE[4:], None, SLICE, id="torch reports the slice"),
        pytest.param(ONE_SLICE, GPU_UUID, None, SLICE, id="only one slice"),
        pytest.param(TWO_SLICES, GPU_UUID, NEIGHBOR, NEIGHBOR, id="named by the variable"),
        pytest.param(TWO_SLICES, GPU_UUID, f"0,{SLICE}", SLICE, id="named next to a number"),
        pytest.param(TWO_SLICES, GPU_UUID, f"{SLICE},{NEIGHBOR}", GPU_UUID, id="two are named"),
        pytest.param(TWO_SLICES, GPU_UUID, "MIG-gone", GPU_UUID, id="the named slice is gone"),
        pytest.param(TWO_SLICES, GPU_UUID, None, GPU_UUID, id="ambiguous"),
    ],
)
def test_which_slice_a_worker_is_in(
    fake_nvml: FakeNvml, state: str, torch_uuid: str, visible: str | None, found: str
) -> None:
    fake_nvml.write(state)
    assert nvml_answer(fake_nvml, f"nvml.uuid_of({torch_uuid!r}, {visible!r})") == found


def test_a_slice_has_its_own_memory_and_the_whole_gpus_clocks(fake_nvml: FakeNvml) -> None:
    fake_nvml.write(TWO_SLICES + "process 17 5\n")
    expression = (
        "[nvml.uuids(), [nvml.device_bytes(uuid) for uuid in nvml.uuids()], "
        "[nvml.processes(uuid) for uuid in nvml.uuids()], nvml.state(nvml.uuids()[1], False), nvml.gpus()]"
    )
    uuids, sizes, processes, state, gpus = nvml_answer(fake_nvml, expression)
    assert uuids == [GPU_UUID, SLICE, NEIGHBOR]
    assert sizes == [1_000_000, 2_000_000, 3_000_000]
    assert processes == [[], [], [[17, 5]]]
    assert state["sm_clock_mhz"] == 1980
    (gpu,) = msgspec.convert(gpus, list[Gpu])
    assert (gpu.uuid, gpu.mig, gpu.memory_bytes) == (GPU_UUID, True, 85_899_345_920)


def test_without_privileges_the_slices_are_still_readable(fake_nvml: FakeNvml) -> None:
    fake_nvml.write(TWO_SLICES.replace("used 1000000", "used 1000000\nmemory_error 4"))
    gpus, found = nvml_answer(fake_nvml, f"[nvml.gpus(), nvml.uuid_of({GPU_UUID!r}, {SLICE!r})]")
    assert [(gpu["memory_bytes"], gpu["mig"]) for gpu in gpus] == [(20_000_000_000, True)]
    assert found == SLICE


@pytest.mark.parametrize("refused", [False, True])
def test_a_worker_in_a_slice_is_measured_there(
    golden: Golden, fake_nvml: FakeNvml, tmp_path: Path, refused: bool
) -> None:
    whole = "memory_error 4\n" if refused else ""
    fake_nvml.write(TWO_SLICES.replace(f"slice {SLICE}", whole + f"slice {SLICE}"))
    in_slice = f"""
def show_slice(used, process):
    line = f"used {{used}}\\nprocess {{os.getpid()}} {{process}}\\n"
    show(7, None, {whole!r} + "slice {SLICE}\\n" + line + "slice {NEIGHBOR}\\n")

def ready_in_slice():
    say("ready", pid=os.getpid(), at_ns=time.monotonic_ns(), python="3.12", versions={{"torch": "2"}},
        device="cuda:0", device_name="Fake H100 MIG 1g.10gb", device_uuid={GPU_UUID!r},
        cuda_visible_devices={SLICE!r}, cuda_device_order="PCI_BUS_ID")
"""
    script = FULL_RUN.replace("show(", "show_slice(").replace("ready()", "ready_in_slice()")
    cell = run_fake_worker(fake_nvml, tmp_path, in_slice + script)
    assert isinstance(cell.outcome, Done)
    assert cell.ready is not None
    assert (cell.ready.cuda_visible_devices, cell.ready.cuda_device_order) == (SLICE, "PCI_BUS_ID")
    assert (cell.nvml_uuid, cell.baseline_device_bytes) == (SLICE, 2_000_000)
    decode = readings(cell)["decode"]
    assert (decode.process_bytes, decode.device_bytes) == (1600 * MIB, 1700 * MIB)
    assert decode.gpu is not None
    assert decode.gpu.sm_clock_mhz == 1980
    (line,) = warnings_of(in_run(cell, mig=True))
    assert SLICE in line
    golden(line)


def test_in_an_unknown_slice_the_whole_gpus_memory_is_measured(golden: Golden) -> None:
    cell = make_cell(nvml_uuid=GPU_UUID, ready=make_ready(GPU_UUID))
    (line,) = warnings_of(in_run(cell, mig=True))
    golden(line)
    assert warnings_of(in_run(cell)) == []


def test_a_driver_that_includes_its_own_reservation_gives_a_warning(
    golden: Golden, fake_nvml: FakeNvml, tmp_path: Path
) -> None:
    fake_nvml.write(ONE_GPU + "memory_info_version 1\n")
    show_old = 'def show_old(used, process):\n    show(used, process, "memory_info_version 1\\n")\n'
    cell = run_fake_worker(fake_nvml, tmp_path, show_old + FULL_RUN.replace("show(", "show_old("))
    assert cell.baseline_device_bytes == 501_000_000
    assert readings(cell)["decode"].device_bytes == 1700 * MIB + 500_000_000
    assert warnings_of(in_run(cell)) == []
    (line,) = warnings_of(in_run(cell, memory_info_version=1))
    golden(line)


@pytest.mark.parametrize(
    ("device", "variables", "differs"),
    [
        pytest.param("cuda:1", {}, False, id="same number"),
        pytest.param("cuda:0", {"cuda_visible_devices": "1"}, True, id="hidden GPUs"),
        pytest.param("cuda:0", {}, True, id="fastest first"),
        pytest.param(
            "cuda:0",
            {"cuda_visible_devices": GPU_UUID, "cuda_device_order": "PCI_BUS_ID"},
            True,
            id="both variables",
        ),
    ],
)
def test_a_different_number_in_cuda_and_nvml_gives_a_warning(
    golden: Golden, device: str, variables: dict[str, str], differs: bool
) -> None:
    ready = msgspec.structs.replace(make_ready(GPU_UUID), device=device, **variables)
    lines = warnings_of(in_run(make_cell(ready=ready), index=1))
    assert len(lines) == differs
    for line in lines:
        assert all(f"{name.upper()}={value}" in line for name, value in variables.items())
        golden(line)


def test_a_worker_reports_the_variables_that_cuda_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.generation.device import Device
    from workers.harness.startup import ready_frame

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    ready = ready_frame(Device("cpu"), {})
    assert (ready.cuda_visible_devices, ready.cuda_device_order) == ("2,0", None)
