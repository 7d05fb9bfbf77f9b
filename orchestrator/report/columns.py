"""The columns of a run's table."""

from collections.abc import Callable
from typing import NamedTuple

from orchestrator.analysis.metrics import CellMetrics
from orchestrator.units import ABSENT, mib, milliseconds, percent, rate, ratio
from schemas.record import Run


class Column(NamedTuple):
    """A heading, and how to show the figure of a row."""

    heading: str
    show: Callable[[CellMetrics], str]


SPEED = [
    Column("TTFT ms", lambda row: milliseconds(row.ttft_s)),
    Column("decode tok/s", lambda row: rate(row.decode_tok_s)),
    Column("vs FP16", lambda row: versus_fp16(row)),
    Column("MBU", lambda row: percent(row.decode_mbu)),
]
BOUND = Column("bound", lambda row: row.decode_bound or ABSENT)
END_TO_END = Column("end to end tok/s", lambda row: rate(row.end_to_end_tok_s))
GPU_MEMORY = [
    Column("loaded MiB", lambda row: mib(row.loaded_bytes)),
    Column("peak MiB", lambda row: mib(row.peak_bytes)),
    Column("NVML peak MiB", lambda row: mib(row.nvml_peak_bytes)),
    Column("saved", lambda row: percent(row.saved_versus_baseline)),
]
CPU_MEMORY = [
    Column("weight MiB", lambda row: mib(row.weight_bytes)),
    Column("RSS loaded MiB", lambda row: mib(row.loaded_bytes)),
    Column("RSS peak MiB", lambda row: mib(row.peak_bytes)),
    Column("saved", lambda row: percent(row.saved_versus_baseline)),
]


def columns(run: Run, rows: list[CellMetrics]) -> list[Column]:
    """The columns for the device of a run, including those in which its rows differ."""
    on_cpu = all(job.device == "cpu" for job in run.plan.jobs)
    shown = [Column("precision", lambda row: row.precision)]
    if {row.decode for row in rows} != {"eager"}:
        shown.append(Column("decode", lambda row: row.decode))
    if len({row.batch_size for row in rows}) > 1:
        shown.append(Column("batch", lambda row: str(row.batch_size)))
    if len({row.prompt_tokens for row in rows}) > 1:
        shown.append(
            Column("prompt", lambda row: ABSENT if row.prompt_tokens is None else f"{row.prompt_tokens:,}")
        )
    if len({row.depth for row in rows}) > 1:
        shown.append(Column("depth", lambda row: f"{row.depth:,}"))
    if len({row.new_tokens for row in rows} - {None}) > 1:
        shown.append(Column("new", lambda row: ABSENT if row.new_tokens is None else f"{row.new_tokens:,}"))
    bound = [BOUND] if any(row.decode_bound for row in rows) else []
    return [*shown, *SPEED, *bound, END_TO_END, *(CPU_MEMORY if on_cpu else GPU_MEMORY)]


def versus_fp16(row: CellMetrics) -> str:
    """The ratio and its interval; in parentheses if the host limited the speed."""
    shown = ratio(row.decode_versus_baseline)
    if row.decode_versus_low is not None and row.decode_versus_high is not None:
        shown += f" [{row.decode_versus_low:.2f}, {row.decode_versus_high:.2f}]"
    return f"({shown})" if row.decode_bound == "launch" and row.decode_versus_baseline is not None else shown
