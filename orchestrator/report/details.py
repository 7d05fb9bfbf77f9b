"""The output of `--verbose`: device peaks, and for each row its modules, settings and slowest kernels."""

from collections.abc import Iterator

from orchestrator.analysis.metrics import CellAnalysis, CellMetrics
from orchestrator.records.keys import key_of
from orchestrator.report.kernel_names import short_kernel_name
from orchestrator.units import ABSENT, duration, mib, milliseconds, percent, rate
from schemas.frames import KernelTimes, Loaded, Peaks
from schemas.record import CellRecord, Datasheet, PeaksRecord

SHOWN_KERNELS = 5


def details(peaks: PeaksRecord | None, cells: list[CellAnalysis]) -> list[str]:
    """Lines to print below the table, in the order of its rows."""
    lines = list(_peaks(peaks)) if peaks else []
    described: set[str] = set()
    for each in cells:
        cell = each.cell
        if cell.loaded and cell.precision not in described:
            described.add(cell.precision)
            lines += ["", f"{cell.precision}: {cell.label}", *_loaded(cell.loaded)]
        lines += _cell(cell, each.row)
    return lines


def _peaks(record: PeaksRecord) -> Iterator[str]:
    if not isinstance(record.outcome, Peaks):
        yield f"device peaks: {record.outcome.message}"
        return
    sheet = record.datasheet
    measured = record.outcome
    yield f"device peaks, measured in {measured.measured_s:.1f} s (in brackets: {_source(sheet)})"
    published = f" [{sheet.read_bytes_per_s / 1e9:,.0f}]" if sheet else ""
    copied = f"copy {measured.copy_bytes_per_s / 1e9:,.0f} GB/s"
    yield f"  read {measured.read_bytes_per_s / 1e9:,.0f}{published} GB/s, {copied}"
    for dtype, flop_per_s in measured.matrix_flop_per_s.items():
        known = sheet.matrix_flop_per_s.get(dtype) if sheet else None
        published = f" [{known / 1e12:,.0f}]" if known else ""
        yield f"  {dtype} {flop_per_s / 1e12:,.1f}{published} TFLOP/s"
    for dtype, why in measured.missing.items():
        yield f"  {dtype}: {why}"


def _source(sheet: Datasheet | None) -> str:
    return sheet.source if sheet else "no data sheet known"


def _loaded(loaded: Loaded) -> Iterator[str]:
    stored = ", ".join(f"{mib(size)} MiB {dtype}" for dtype, size in loaded.weight_bytes.items())
    yield f"  {loaded.parameters:,} parameters in {stored}; computes in {loaded.compute_dtype}"
    yield "  modules: " + _counts(loaded.module_classes or loaded.linear_classes)
    if loaded.unquantized_linears:
        yield "  left unquantized: " + _counts(loaded.unquantized_linears)
    if loaded.off_device:
        yield "  not on the device: " + ", ".join(loaded.off_device)
    yield "  settings: " + ", ".join(f"{name} {value}" for name, value in loaded.settings.items())


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in found.items())


def _cell(cell: CellRecord, row: CellMetrics) -> Iterator[str]:
    if row.reason:
        return
    yield f"  {key_of(cell).name}: {_steps(row)}"
    if cell.setup and cell.setup.compile_s is not None:
        yield f"    compiled in {duration(cell.setup.compile_s)}, {cell.setup.graph_breaks} graph breaks"
    if cell.profile:
        yield from _kernels("prefill", cell.profile.prefill)
        yield from _kernels("decode", cell.profile.decode)


def _steps(row: CellMetrics) -> str:
    roof = f"{rate(row.decode_tok_s)} of at most {rate(row.decode_roof_tok_s)} tok/s"
    bound = f"{row.prefill_bound}-bound" if row.prefill_bound else "bound unknown"
    prefill = f"prefill MFU {percent(row.prefill_mfu)}, {bound}"
    return f"{row.warmup_trials or ABSENT} warm-up trials; decode {roof}, {prefill}"


def _kernels(stage: str, times: KernelTimes | None) -> Iterator[str]:
    if times is None:
        return
    busy_s = milliseconds(times.busy_s / times.steps)
    yield f"    {stage}: {times.launches / times.steps:,.0f} kernels, GPU busy {busy_s} ms; slowest:"
    for kernel in times.kernels[:SHOWN_KERNELS]:
        share, count = kernel.total_s / times.busy_s, kernel.count / times.steps
        yield f"      {percent(share):>4}  {count:6,.1f} ×  {short_kernel_name(kernel.name)}"
