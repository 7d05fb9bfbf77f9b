"""What a reader must know before believing a table: one plain line each, from pure functions."""

from collections import Counter
from collections.abc import Iterator

from orchestrator.conditions import DIFFERENCE, FlagKind, flags
from orchestrator.memory import on_gpu
from orchestrator.units import duration, percent
from orchestrator.workloads import full_name
from schemas.frames import Done
from schemas.record import CellRecord, Run, Skipped

MIXED_PACKAGES = ("torch", "transformers")
"""Packages whose versions move every figure, so that a mix within a table must be seen."""

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
    for cell in run.cells:
        if isinstance(cell.outcome, Done):
            yield from _shortened_cell(cell, cell.outcome, full_name(cell, run.cells))
        elif isinstance(cell.outcome, Skipped):
            yield f"{full_name(cell, run.cells)}: left out, {cell.outcome.reason}"


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
    measured = [cell.trials for cell in run.cells if isinstance(cell.outcome, Done)]
    counts = {len(trials) for trials in measured}
    lengths = {trial.prompt_tokens for trials in measured for trial in trials}
    if len(counts) > 1 and len(lengths) > 1:
        yield (
            f"rows rest on {min(counts)} to {max(counts)} prompts of different length, so their TTFT are of "
            "different prompts: compare prefill_tok_s in qbench-report --format csv"
        )


def _conditions(run: Run) -> Iterator[str]:
    """A line per flag; but one for all cells where many are alike, as eager decode on a busy host is."""
    raised = [(full_name(cell, run.cells), flag) for cell in run.cells for flag in flags(cell)]
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
                yield f"{cell.precision}: NVML process bytes are missing: {reason}"
