"""What a reader must know before believing a table: one plain line each, from pure functions."""

from collections import Counter
from collections.abc import Iterator

from orchestrator.analysis.conditions import DIFFERENCE, FlagKind, flags
from orchestrator.analysis.memory.phases import on_gpu, phase_memory
from orchestrator.records.keys import BASELINE
from orchestrator.records.names import full_names
from orchestrator.units import duration, mib, milliseconds, percent
from schemas.frames import Done
from schemas.record import CellRecord, ForeignProcess, Run, Skipped

MIXED_PACKAGES = ("torch", "transformers")
"""Packages whose versions move every figure, so that a mix within a table must be seen."""

MISSED_SHARE = 0.1
"""Samples missed for each one taken, from which on a reader is told."""

MERGED: dict[FlagKind, str] = {
    "never-settled": (
        "warm-up never settled: the last two of its trials still differed in {}; the timed trials after it "
        "are kept"
    ),
    "unstable": (
        f"decode time per token differs by more than {percent(DIFFERENCE)} between trials of {{}}; all are "
        "kept, so read small differences between rows with care"
    ),
}
"""What is said once where it holds for several cells, which are put in with their differences."""


def run_warnings(run: Run) -> list[str]:
    """Everything worth a warning in a run, most general first."""
    about = (
        _notices,
        _device,
        _mixed_versions,
        _shortened,
        _unequal_prompts,
        _conditions,
        _hidden_memory,
        _reserved_by_driver,
        _sliced,
        _other_numbers,
        _leftovers,
        _strangers,
        _missed_samples,
    )
    # Each line once: what is so of a worker is found in every cell of it.
    return list(dict.fromkeys(line for find in about for line in find(run)))


def _notices(run: Run) -> Iterator[str]:
    notices = (job.model.notice for job in run.plan.jobs)
    yield from dict.fromkeys(notice for notice in notices if notice)


def _device(run: Run) -> Iterator[str]:
    if any(job.device == "cpu" for job in run.plan.jobs):
        why = f" ({run.environment.gpu_reason})" if run.environment.gpu_reason else ""
        yield f"no NVIDIA GPU was used{why}: memory is the resident set of the worker process"


def _mixed_versions(run: Run) -> Iterator[str]:
    """Each row that differs from the baseline; without a baseline, who has which."""
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
            yield f"{cell.precision} ran with {mix}: what differs between them is not the precision alone"


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


def _listed(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _shortened(run: Run) -> Iterator[str]:
    name = full_names(run.cells)
    for cell in run.cells:
        if isinstance(cell.outcome, Done):
            yield from _shortened_cell(cell, cell.outcome, name(cell))
        elif isinstance(cell.outcome, Skipped):
            yield f"{name(cell)}: left out, {cell.outcome.reason}"


def _shortened_cell(cell: CellRecord, done: Done, name: str) -> Iterator[str]:
    if done.trials_measured == done.trials_planned and not any(trial.cut_short for trial in cell.trials):
        return
    if cell.job is None or cell.job.budget_s is None:
        return
    share = f"its {duration(cell.job.budget_s)} of the budget"
    trials = f"{done.trials_measured} of {done.trials_planned} trials"
    if cell.trials[0].cut_short:
        trials += f", {cell.trials[0].new_tokens} of {cell.job.workload.new_tokens} tokens"
    yield f"{name}: {trials} fitted into {share}"


def _unequal_prompts(run: Run) -> Iterator[str]:
    """A budget lets slow precisions measure the first prompts only, and prefill grows with the prompt."""
    done = [(cell, cell.outcome) for cell in run.cells if isinstance(cell.outcome, Done)]
    if all(outcome.trials_measured == outcome.trials_planned for _, outcome in done):
        return
    measured = [cell.trials for cell, _ in done]
    counts = {len(trials) for trials in measured}
    lengths = {trial.prompt_tokens for trials in measured for trial in trials}
    if len(counts) > 1 and len(lengths) > 1:
        yield (
            f"rows rest on {min(counts)} to {max(counts)} prompts of different length, so their TTFT are of "
            "different prompts: compare prefill_tok_s in qbench-report --format csv"
        )


def _conditions(run: Run) -> Iterator[str]:
    """A line per flag; but one for all cells where many are alike, as eager decode on a busy host is."""
    name = full_names(run.cells)
    raised = [(name(cell), flag) for cell in run.cells for flag in flags(cell)]
    counts = Counter(flag.kind for _, flag in raised)
    merged = {kind: line for kind, line in MERGED.items() if counts[kind] > 1}
    yield from (f"{name}: {flag.sentence}" for name, flag in raised if flag.kind not in merged)
    for kind, line in merged.items():
        cells = (f"{name} ({percent(flag.difference)})" for name, flag in raised if flag.kind == kind)
        yield line.format(", ".join(cells))


def _hidden_memory(run: Run) -> Iterator[str]:
    for cell in run.cells:
        reasons = (edge.reading.reason for edge in cell.edges if edge.reading and cell.ready)
        for reason in dict.fromkeys(reason for reason in reasons if reason):
            if on_gpu(cell):
                estimate = _estimate(cell.precision, run.cells)
                yield f"{cell.precision}: NVML process bytes are missing: {reason}{estimate}"


def _estimate(precision: str, cells: list[CellRecord]) -> str:
    """What stands in for the process's bytes, at its highest in any cell of this precision."""
    own = (cell for cell in cells if cell.precision == precision)
    phases = (phase for cell in own for phase in phase_memory(cell) if phase.phase != "profile")
    over = (phase.device_over_baseline_bytes for phase in phases)
    highest = max((size for size in over if size is not None), default=None)
    if highest is None:
        return ""
    return (
        f"; as an estimate, the whole device held up to {mib(highest)} MiB more than just before the worker "
        "started, whoever's they are"
    )


def _reserved_by_driver(run: Run) -> Iterator[str]:
    used = {cell.ready.device_uuid for cell in run.cells if cell.ready}
    if any(gpu.memory_info_version == 1 and gpu.uuid in used for gpu in run.environment.gpus):
        yield (
            "the driver is too old to tell what it reserves for itself, so NVML's device bytes include that "
            "(some hundred MiB); process bytes don't"
        )


def _sliced(run: Run) -> Iterator[str]:
    mig = {gpu.uuid for gpu in run.environment.gpus if gpu.mig}
    for cell in run.cells:
        asked = cell.nvml_uuid or ""
        if asked.startswith("MIG-"):
            yield (
                f"the workers ran in a MIG slice ({asked}): NVML's device bytes are the slice's, but clocks, "
                "temperature and power are the whole GPU's, neighbours included"
            )
        elif asked in mig:
            yield (
                "the GPU is in MIG mode, and which slice the workers ran in could not be told: NVML's device "
                "bytes are the whole GPU's, neighbours included; name one slice in CUDA_VISIBLE_DEVICES"
            )


def _other_numbers(run: Run) -> Iterator[str]:
    """CUDA's numbers are not NVML's: whoever looks at nvidia-smi beside this table looks for another one."""
    numbers = {gpu.uuid: gpu.index for gpu in run.environment.gpus}
    for ready in (cell.ready for cell in run.cells if cell.ready):
        number = numbers.get(ready.device_uuid or "")
        if number is None or ready.device.partition(":")[2] in ("", str(number)):
            continue
        settings = {
            "CUDA_VISIBLE_DEVICES": ready.cuda_visible_devices,
            "CUDA_DEVICE_ORDER": ready.cuda_device_order,
        }
        told = ", ".join(f"{name}={value}" for name, value in settings.items() if value is not None)
        why = told or "CUDA counts the fastest first"
        yield f"{ready.device} is GPU {number} to NVML and nvidia-smi ({why})"


def _leftovers(run: Run) -> Iterator[str]:
    for cell in run.cells:
        left = cell.leftover
        if left is None:
            continue
        held = "NVML would not list who holds it"
        if left.holders is not None:
            held = f"NVML lists {_processes(left.holders)}" if left.holders else "NVML lists no process"
        yield (
            f"{cell.precision}: when its worker was started, the GPU still held "
            f"{mib(left.over_baseline_bytes)} MiB more than before the run ({held}); speed and the room for "
            "memory may suffer from it"
        )


def _strangers(run: Run) -> Iterator[str]:
    name = full_names(run.cells)
    for cell in run.cells:
        seen = [edge.reading.others for edge in cell.edges if edge.reading and edge.reading.others]
        if seen:
            most = max(seen, key=lambda others: sum(other.used_bytes or 0 for other in others))
            pids = {other.pid: other for others in seen for other in others}
            yield (
                f"{name(cell)}: not alone on the GPU while it was measured: "
                f"{_processes(list(pids.values()))}, at most {_together(most)} at once; speed and memory may "
                "be theirs too"
            )


def _processes(processes: list[ForeignProcess]) -> str:
    return ("pid " if len(processes) == 1 else "pids ") + ", ".join(str(each.pid) for each in processes)


def _together(processes: list[ForeignProcess]) -> str:
    known = [each.used_bytes for each in processes if each.used_bytes is not None]
    if not known:
        return "an unknown number of MiB"
    return f"{mib(sum(known))} MiB" + ("" if len(known) == len(processes) else " and an unknown rest")


def _missed_samples(run: Run) -> Iterator[str]:
    for cell in run.cells:
        stats = cell.sampler
        if stats is None or not stats.missed or stats.missed <= MISSED_SHARE * stats.samples:
            continue
        yield (
            f"{cell.precision}: {stats.missed} samples of memory were missed and {stats.samples} taken, the "
            f"slowest in {milliseconds(stats.longest_call_s)} ms: peaks between phases may have been higher"
        )
