"""Each precision's speed-up on each GPU, from runs on several GPUs: best decode mode over FP16's best.

It is shown next to the formats that a GPU's tensor cores support, by its compute capability: for any other
format a kernel must convert, so the format can only save bytes.
"""

import msgspec

from orchestrator.analysis.best_mode import Best
from orchestrator.analysis.comparison.measured_run import CrossRunKey, MeasuredRun, distinctions
from orchestrator.analysis.memory.phases import on_gpu
from schemas.frames import Done
from schemas.record import CellRecord

TENSOR_CORES: dict[str, tuple[tuple[int, int], tuple[int, int] | None]] = {
    "INT8": ((7, 2), None),
    "INT4": ((7, 5), (8, 9)),
    "FP8": ((8, 9), None),
}
"""Format → first compute capability whose tensor cores support it, and the last, if it was dropped (NVIDIA,
CUDA C++ Programming Guide, table of data types per compute capability)."""


class GpuSpeedups(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU's row."""

    run: str
    gpu: str
    measured: str
    """How its settings differ from the others', e.g. `model qwen2.5-7b`; empty if they don't."""
    compute_capability: tuple[int, int] | None
    tensor_cores: list[str]
    """Supported formats, of INT8, INT4 and FP8."""
    best: dict[str, Best]
    """Precision → its best mode on the first workload of its run."""


def gpu_speedups(runs: dict[str, MeasuredRun]) -> list[GpuSpeedups]:
    """A row for each run that has figures from a GPU; `runs` maps names to runs."""
    firsts = {name: key for name, run in runs.items() if (key := _first_on_gpu(run))}
    labels = distinctions(list(firsts.values()))
    return [_row(name, runs[name], key, labels[key]) for name, key in firsts.items()]


def _first_on_gpu(run: MeasuredRun) -> CrossRunKey | None:
    """The first cell on a GPU that has figures; its workload is the row's."""
    cells = run.cells.items()
    return next((key for key, cell in cells if any(map(_has_figures, cell.records))), None)


def _has_figures(record: CellRecord) -> bool:
    return isinstance(record.outcome, Done) and on_gpu(record)


def _row(name: str, measured: MeasuredRun, first: CrossRunKey, label: str) -> GpuSpeedups:
    run = measured.run
    ready = next(cell.ready for cell in run.cells if cell.ready and cell.ready.device_uuid)
    gpu = next((each for each in run.environment.gpus if each.uuid == ready.device_uuid), None)
    capability = gpu.compute_capability if gpu else None
    return GpuSpeedups(
        run=name,
        gpu=ready.device_name,
        measured=label,
        compute_capability=capability,
        tensor_cores=[name for name in TENSOR_CORES if capability and _has(capability, name)],
        best={best.precision: best for best in measured.bests if best.workload == first.cell.workload},
    )


def _has(capability: tuple[int, int], name: str) -> bool:
    first, last = TENSOR_CORES[name]
    return first <= capability and (last is None or capability <= last)
