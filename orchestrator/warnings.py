"""What a reader must know before believing a table: one plain line each, from pure functions."""

from collections.abc import Iterator

from orchestrator.memory import on_gpu
from orchestrator.units import duration
from schemas.frames import Done
from schemas.record import CellRecord, Run, Skipped

MIXED_PACKAGES = ("torch", "transformers")
"""Packages whose versions move every figure, so that a mix within a table must be seen."""


HOST_BOUND_SHARE = 0.95
"""Part of decode's wall span spent issuing it, from which on the GPU is taken to wait for the host."""


def run_warnings(run: Run) -> list[str]:
    """Everything worth a warning in a run, most general first."""
    about = (
        _notices,
        _device,
        _mixed_versions,
        _shortened,
        _unequal_prompts,
        _paced_by_host,
        _hidden_memory,
    )
    return [line for find in about for line in find(run)]


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
            mix = "; ".join(f"{version} in {', '.join(names)}" for version, names in users.items())
            yield f"{package} differs between rows: {mix}"


def _shortened(run: Run) -> Iterator[str]:
    for cell in run.cells:
        if isinstance(cell.outcome, Done):
            yield from _shortened_cell(cell, cell.outcome)
        elif isinstance(cell.outcome, Skipped):
            yield f"{cell.precision}: left out, {cell.outcome.reason}"


def _shortened_cell(cell: CellRecord, done: Done) -> Iterator[str]:
    if done.trials_measured == done.trials_planned and not any(trial.cut_short for trial in cell.trials):
        return
    if cell.job is None or cell.job.budget_s is None:
        return
    share = f"its {duration(cell.job.budget_s)} of the budget"
    trials = f"{done.trials_measured} of {done.trials_planned} trials"
    if cell.trials[0].cut_short:
        trials += f", {cell.trials[0].new_tokens} of {cell.job.workload.new_tokens} tokens"
    yield f"{cell.precision}: {trials} fitted into {share}"


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


def _paced_by_host(run: Run) -> Iterator[str]:
    """On a GPU work is issued ahead; if issuing takes as long as doing, the GPU waits for the host."""
    paced = []
    for cell in run.cells:
        decode_s = sum(trial.decode_s for trial in cell.trials)
        enqueue_s = sum(trial.enqueue_s for trial in cell.trials)
        if on_gpu(cell) and decode_s and enqueue_s >= HOST_BOUND_SHARE * decode_s:
            paced.append(cell.precision)
    if paced:
        yield (
            f"the host, not the GPU, set the pace of decode in {', '.join(paced)}: issuing the kernels took "
            f"over {HOST_BOUND_SHARE:.0%} of the time, so these ratios compare launch overhead, not formats"
        )


def _hidden_memory(run: Run) -> Iterator[str]:
    for cell in run.cells:
        reasons = (edge.reading.reason for edge in cell.edges if edge.reading and cell.ready)
        for reason in dict.fromkeys(reason for reason in reasons if reason):
            if on_gpu(cell):
                yield f"{cell.precision}: NVML process bytes are missing: {reason}"
