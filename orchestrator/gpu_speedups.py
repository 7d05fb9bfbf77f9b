"""What each precision wins on each GPU, from runs of several: best decode mode over FP16's best.

Beside it stands which formats a GPU's tensor cores multiply, by its compute capability: where they can't, a
kernel must convert, and a format can only save bytes.
"""

import msgspec

from orchestrator.best_mode import Best, best_modes
from orchestrator.rounds import summarize_rounds
from schemas.record import Run

TENSOR_CORES: dict[str, tuple[tuple[int, int], tuple[int, int] | None]] = {
    "INT8": ((7, 2), None),
    "INT4": ((7, 5), (8, 9)),
    "FP8": ((8, 9), None),
}
"""Format → first compute capability whose tensor cores take it, and the last, where it was dropped (NVIDIA,
CUDA C++ Programming Guide, table of data types per compute capability)."""


class GpuSpeedups(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU's row."""

    gpu: str
    compute_capability: tuple[int, int] | None
    tensor_cores: list[str]
    """Formats that they multiply, of INT8, INT4 and FP8."""
    best: dict[str, Best]
    """Precision → its best mode on the first workload of its run."""


def gpu_speedups(runs: list[Run]) -> list[GpuSpeedups]:
    """A row for each run that was made on a GPU."""
    return [row for run in runs if (row := _row(run))]


def _row(run: Run) -> GpuSpeedups | None:
    ready = next((cell.ready for cell in run.cells if cell.ready and cell.ready.device_uuid), None)
    if ready is None:
        return None
    gpu = next((each for each in run.environment.gpus if each.uuid == ready.device_uuid), None)
    capability = gpu.compute_capability if gpu else None
    best: dict[str, Best] = {}
    for each in best_modes(summarize_rounds(run)):
        best.setdefault(each.precision, each)
    return GpuSpeedups(
        gpu=ready.device_name,
        compute_capability=capability,
        tensor_cores=[name for name in TENSOR_CORES if capability and _has(capability, name)],
        best=best,
    )


def _has(capability: tuple[int, int], name: str) -> bool:
    first, last = TENSOR_CORES[name]
    return first <= capability and (last is None or capability <= last)
