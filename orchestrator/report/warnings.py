"""Warnings that a reader needs before trusting a table, one line each, from pure functions."""

from collections import Counter
from collections.abc import Iterator, Sequence

from orchestrator.analysis.conditions import DIFFERENCE, FlagKind, flags
from orchestrator.analysis.memory.phases import PhaseMemory, on_gpu
from orchestrator.records.keys import BASELINE
from orchestrator.records.names import cell_namer
from orchestrator.units import counted, duration, mib, milliseconds, percent
from schemas.frames import Done
from schemas.record import CellRecord, ForeignProcess, Run, Skipped

MIXED_PACKAGES = ("torch", "transformers")
"""Packages whose versions affect every figure, so a mix of versions within a table is reported."""

MISSED_SHARE = 0.1
"""Missed samples per sample taken, above which there is a warning."""

MERGED: dict[FlagKind, str] = {
    "never-settled": (
        "warm-up never settled: its last two trials still differed in {}; the timed trials after it are kept"
    ),
    "unstable": (
        f"decode time per token differs by more than {percent(DIFFERENCE)} between trials of {{}}; all are "
        "kept, so read small differences between rows with care"
    ),
}
"""Warnings stated once for several cells, which fill the braces with their differences."""


def run_warnings(run: Run, phases: Sequence[list[PhaseMemory]]) -> list[str]:
    """All warnings about a run, most general first. `phases` are those of its cells, in order."""
    checks = (
        _notices,
        _device,
        _mixed_versions,
        _shortened,
        _unequal_prompts,
        _conditions,
        lambda run: _hidden_memory(run, phases),
        _reserved_by_driver,
        _mig,
        _gpu_numbers,
        _leftover_memory,
        _other_processes,
        _missed_samples,
    )
    # Each line once: a worker's problem is found again in each of its cells.
    return list(dict.fromkeys(line for check in checks for line in check(run)))


def _notices(run: Run) -> Iterator[str]:
    notices = (job.model.notice for job in run.plan.jobs)
    yield from dict.fromkeys(notice for notice in notices if notice)


def _device(run: Run) -> Iterator[str]:
    if any(job.device == "cpu" for job in run.plan.jobs):
        why = f" ({run.environment.gpu_reason})" if run.environment.gpu_reason else ""
        yield f"no NVIDIA GPU was used{why}: memory is the resident set of the worker process"


def _mixed_versions(run: Run) -> Iterator[str]:
    """Each row that differs from the baseline; without a baseline, the rows of each version."""
    baseline = next((cell.ready for cell in run.cells if cell.precision == BASELINE and cell.ready), None)
    if baseline is None:
        yield from _mixed_without_baseline(run)
        return
    for cell in run.cells:
        here = cell.ready.versions if cell.ready else {}
        mix = " and ".join(
            f"{package} {here[package]} ({BASELINE}: {there})"
            for package, there in baseline.versions.items()
            if package in MIXED_PACKAGES and here.get(package, there) != there
        )
        if mix:
            yield f"{cell.precision} ran with {mix}: the two differ in more than their precision"


def _mixed_without_baseline(run: Run) -> Iterator[str]:
    for package in MIXED_PACKAGES:
        users: dict[str, list[str]] = {}
        for cell in run.cells:
            if cell.ready and package in cell.ready.versions:
                users.setdefault(cell.ready.versions[package], []).append(cell.precision)
        if len(users) > 1:
            mix = "; ".join(
                f"{version} in {', '.join(dict.fromkeys(names))}" for version, names in users.items()
            )
            yield f"{package} differs between rows: {mix}"


def _shortened(run: Run) -> Iterator[str]:
    name = cell_namer(run.cells)
    for cell in run.cells:
        if isinstance(cell.outcome, Done):
            yield from _shortened_cell(cell, cell.outcome, name(cell))
        elif isinstance(cell.outcome, Skipped):
            yield f"{name(cell)}: skipped, {cell.outcome.reason}"


def _shortened_cell(cell: CellRecord, done: Done, name: str) -> Iterator[str]:
    if done.trials_measured == done.trials_planned and not any(trial.cut_short for trial in cell.trials):
        return
    if cell.job is None or cell.job.budget_s is None:
        return
    share = f"its {duration(cell.job.budget_s)} share of the budget"
    trials = f"{done.trials_measured} of {counted(done.trials_planned, 'trial')}"
    if cell.trials[0].cut_short:
        trials += f", {cell.trials[0].new_tokens} of {cell.job.workload.new_tokens} tokens"
    yield f"{name}: {trials} fit into {share}"


def _unequal_prompts(run: Run) -> Iterator[str]:
    """With a budget, slow precisions measure only the first prompts, and prefill time grows with length."""
    done = [(cell, cell.outcome) for cell in run.cells if isinstance(cell.outcome, Done)]
    if all(outcome.trials_measured == outcome.trials_planned for _, outcome in done):
        return
    measured = [cell.trials for cell, _ in done]
    counts = {len(trials) for trials in measured}
    lengths = {trial.prompt_tokens for trials in measured for trial in trials}
    if len(counts) > 1 and len(lengths) > 1:
        yield (
            f"rows are based on {min(counts)} to {max(counts)} prompts of different lengths, so their TTFTs "
            "are not comparable: compare prefill_tok_s in qbench-report --format csv"
        )


def _conditions(run: Run) -> Iterator[str]:
    """A line per flag, but one for all cells if several share it, as with eager decode on a busy host."""
    name = cell_namer(run.cells)
    raised = [(name(cell), flag) for cell in run.cells for flag in flags(cell)]
    counts = Counter(flag.kind for _, flag in raised)
    merged = {kind: line for kind, line in MERGED.items() if counts[kind] > 1}
    yield from (f"{name}: {flag.sentence}" for name, flag in raised if flag.kind not in merged)
    for kind, line in merged.items():
        cells = (f"{name} ({percent(flag.difference)})" for name, flag in raised if flag.kind == kind)
        yield line.format(", ".join(cells))


def _hidden_memory(run: Run, phases: Sequence[list[PhaseMemory]]) -> Iterator[str]:
    for cell in run.cells:
        reasons = (edge.reading.reason for edge in cell.edges if edge.reading and cell.ready)
        for reason in dict.fromkeys(reason for reason in reasons if reason):
            if on_gpu(cell):
                estimate = _estimate(cell.precision, run.cells, phases)
                yield f"{cell.precision}: NVML process bytes are missing: {reason}{estimate}"


def _estimate(precision: str, cells: list[CellRecord], phases: Sequence[list[PhaseMemory]]) -> str:
    """A substitute for the process's bytes: their highest estimate in any cell of this precision."""
    over = (
        phase.device_over_baseline_bytes
        for cell, own in zip(cells, phases, strict=True)
        if cell.precision == precision
        for phase in own
        if phase.phase != "profile"
    )
    highest = max((size for size in over if size is not None), default=None)
    if highest is None:
        return ""
    return (
        f"; as an estimate, the whole device, including other processes, held up to {mib(highest)} MiB more "
        "than just before the worker started"
    )


def _reserved_by_driver(run: Run) -> Iterator[str]:
    used = {cell.ready.device_uuid for cell in run.cells if cell.ready}
    if any(gpu.memory_info_version == 1 and gpu.uuid in used for gpu in run.environment.gpus):
        yield (
            "the driver is too old to report the memory it reserves for itself, so NVML's device bytes "
            "include it (a few hundred MiB); process bytes don't"
        )


def _mig(run: Run) -> Iterator[str]:
    mig = {gpu.uuid for gpu in run.environment.gpus if gpu.mig}
    for cell in run.cells:
        asked = cell.nvml_uuid or ""
        if asked.startswith("MIG-"):
            yield (
                f"the workers ran in a MIG slice ({asked}): NVML's device bytes are the slice's, but clocks, "
                "temperature and power are the whole GPU's, including other slices"
            )
        elif asked in mig:
            yield (
                "the GPU is in MIG mode, and the slice that the workers ran in is unknown: NVML's device "
                "bytes are the whole GPU's, including other slices; name one slice in CUDA_VISIBLE_DEVICES"
            )


def _gpu_numbers(run: Run) -> Iterator[str]:
    """CUDA and NVML number GPUs differently, so nvidia-smi may list the device under another number."""
    numbers = {gpu.uuid: gpu.index for gpu in run.environment.gpus}
    for ready in (cell.ready for cell in run.cells if cell.ready):
        number = numbers.get(ready.device_uuid or "")
        if number is None or ready.device.partition(":")[2] in ("", str(number)):
            continue
        settings = {
            "CUDA_VISIBLE_DEVICES": ready.cuda_visible_devices,
            "CUDA_DEVICE_ORDER": ready.cuda_device_order,
        }
        in_force = ", ".join(f"{name}={value}" for name, value in settings.items() if value is not None)
        why = in_force or "CUDA numbers the fastest first"
        yield f"{ready.device} is GPU {number} in NVML and nvidia-smi ({why})"


def _leftover_memory(run: Run) -> Iterator[str]:
    for cell in run.cells:
        left = cell.leftover
        if left is None:
            continue
        held = "NVML did not list the processes that hold it"
        if left.holders is not None:
            held = f"NVML lists {_processes(left.holders)}" if left.holders else "NVML lists no process"
        yield (
            f"{cell.precision}: when its worker started, {mib(left.over_baseline_bytes)} MiB more of the "
            f"GPU's memory were still in use than before the run ({held}); speed and available memory "
            "may suffer"
        )


def _other_processes(run: Run) -> Iterator[str]:
    name = cell_namer(run.cells)
    for cell in run.cells:
        seen = [edge.reading.others for edge in cell.edges if edge.reading and edge.reading.others]
        if seen:
            most = max(seen, key=lambda others: sum(other.used_bytes or 0 for other in others))
            pids = {other.pid: other for others in seen for other in others}
            yield (
                f"{name(cell)}: other processes were on the GPU while it was measured: "
                f"{_processes(list(pids.values()))}, at most {_together(most)} at once; they may have "
                "affected speed and memory"
            )


def _processes(processes: list[ForeignProcess]) -> str:
    return ("pid " if len(processes) == 1 else "pids ") + ", ".join(str(each.pid) for each in processes)


def _together(processes: list[ForeignProcess]) -> str:
    known = [each.used_bytes for each in processes if each.used_bytes is not None]
    if not known:
        return "an unknown number of MiB"
    return f"{mib(sum(known))} MiB" + ("" if len(known) == len(processes) else " plus an unknown amount")


def _missed_samples(run: Run) -> Iterator[str]:
    for cell in run.cells:
        stats = cell.sampler
        if stats is None or not stats.missed or stats.missed <= MISSED_SHARE * stats.samples:
            continue
        yield (
            f"{cell.precision}: {stats.missed} memory samples were missed and {stats.samples} taken, the "
            f"slowest in {milliseconds(stats.longest_call_s)} ms: peaks between phase edges may have been "
            "higher"
        )
