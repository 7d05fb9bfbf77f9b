"""Measures jobs, from the import of torch on: load once, then warm up, time and profile each job.

A job runs untimed trials until two in a row agree, then every batch of prompts once, greedily, then one pass
under the profiler. A budget shortens the list of trials; only the first trial itself may be cut short, so
that every precision yields at least one figure.
"""

import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial

import torch
from transformers import PreTrainedTokenizerBase

from schemas.frames import Done, PhaseName, Trial
from schemas.job import Job
from workers.generation.device import Device, open_device
from workers.generation.modes import set_up_generation
from workers.generation.prompts import Batch, make_batches
from workers.generation.timed_generation import Generate, Generation, Limits
from workers.harness.inventory import take_inventory
from workers.harness.profiling import profile_generation
from workers.harness.startup import MEASURED_WITH, import_packages, ready_frame
from workers.harness.warmup import run_other_shapes, warm_up
from workers.protocol.backend import LoadedModel
from workers.protocol.channel import Channel
from workers.protocol.errors import Unsupported, describe_failure

MIN_STEPS = 8
"""Decode steps made in a timed trial even after the deadline, because a rate from fewer says little."""
SAMPLE_CHARACTERS = 200

Enter = Callable[[PhaseName, int | None], None]


def measure(job: Job, load: Callable[[Job], LoadedModel], channel: Channel, began_ns: int) -> bool:
    """Load the job's model, measure the job, then measure any further jobs that the parent sends.

    The first job's budget, if any, counts from `began_ns` (monotonic). Errors while loading are raised; later
    ones are sent as Failed, and the result is False.
    """
    versions = import_packages(dict.fromkeys([*job.packages, *MEASURED_WITH]))
    channel.enter("context")
    device = open_device(job)
    channel.send(ready_frame(device, versions))

    enter = partial(_enter, channel, device)
    enter("load")
    loaded = load(job)
    device.release_unused()
    channel.send(take_inventory(loaded, device))
    if device.torch.type == "cuda":
        enter("cublas")
        device.initialize_cublas(loaded.model.dtype)
    all_measured = True
    next_job: Job | None = job
    while next_job is not None:
        all_measured &= _measured(next_job, loaded, device, channel, enter, began_ns)
        if not device.is_usable():
            return False
        device.release_unused()
        next_job = channel.next_job()
        began_ns = time.monotonic_ns()
    return all_measured


def _measured(
    job: Job, loaded: LoadedModel, device: Device, channel: Channel, enter: Enter, began_ns: int
) -> bool:
    try:
        with torch.inference_mode():
            done = _measure_cell(job, loaded, device, channel, enter, began_ns)
    except Exception as error:
        traceback.print_exc()
        channel.send(describe_failure(error))
        return False
    channel.send(done)
    return True


def _measure_cell(
    job: Job, loaded: LoadedModel, device: Device, channel: Channel, enter: Enter, began_ns: int
) -> Done:
    deadline_ns = None if job.budget_s is None else began_ns + int(job.budget_s * 1e9)
    workload = job.workload
    batches = make_batches(job, loaded.tokenizer, loaded.model.config.vocab_size)
    mode, new_tokens = workload.decode, workload.new_tokens
    _check_context(loaded, batches, new_tokens)
    enter("setup")
    with set_up_generation(mode, loaded, batches, new_tokens, device) as (generate, setup):
        channel.send(setup)
        enter("warmup")
        if device.torch.type == "cuda":
            run_other_shapes(generate, batches)
        channel.send(warm_up(generate, batches[0], workload, channel.report, deadline_ns))
        trials = []
        for trial in _trials(generate, batches, new_tokens, enter, deadline_ns):
            channel.send(trial)
            trials.append(trial)
        enter("profile")
        channel.send(profile_generation(generate, batches[0], new_tokens, device))
        enter("end")
    return Done(
        at_ns=time.monotonic_ns(),
        trials_planned=len(batches),
        trials_measured=len(trials),
        sample_text=_text(loaded.tokenizer, trials[0].token_ids),
    )


def _enter(channel: Channel, device: Device, phase: PhaseName, trial: int | None = None) -> None:
    channel.enter(phase, trial, device.memory())


def _trials(
    generate: Generate, batches: list[Batch], new_tokens: int, enter: Enter, deadline_ns: int | None
) -> Iterator[Trial]:
    """One timed trial per batch, while the budget lasts; only the first may be cut short."""
    trial_ns = 0
    for index, batch in enumerate(batches):
        start_ns = time.monotonic_ns()
        if index and deadline_ns is not None and start_ns + trial_ns > deadline_ns:
            return
        enter("prefill", index)
        limits = Limits(new_tokens, None if index else deadline_ns, MIN_STEPS)
        generation = generate(batch, limits, between=partial(enter, "decode", index))
        trial_ns = time.monotonic_ns() - start_ns
        yield _trial(index, batch, generation, new_tokens)


def _trial(index: int, batch: Batch, generation: Generation, new_tokens: int) -> Trial:
    rows, width = batch.ids.shape
    made = generation.token_ids.shape[1]
    if made != 1 + len(generation.token_s):
        raise RuntimeError(f"{len(generation.token_s)} decode steps made {made} tokens")
    return Trial(
        index=index,
        batch_size=rows,
        prompt_tokens=width,
        new_tokens=made,
        prefill_s=generation.prefill_s,
        decode_s=generation.decode_s,
        token_s=generation.token_s,
        enqueue_s=generation.enqueue_s,
        token_ids=generation.token_ids[0].tolist(),
        cut_short=made < new_tokens,
        kv_bytes=generation.kv_bytes,
    )


def _check_context(loaded: LoadedModel, batches: list[Batch], new_tokens: int) -> None:
    context_length = getattr(loaded.model.config, "max_position_embeddings", None)
    needed = max(batch.prompt_end for batch in batches) + new_tokens
    if context_length is not None and needed > context_length:
        raise Unsupported(
            f"{needed} tokens of context, prompt and answer exceed the model's {context_length}",
            "lower --depth, --prompt-tokens or --new-tokens",
        )


def _text(tokenizer: PreTrainedTokenizerBase | None, ids: list[int]) -> str | None:
    return None if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True)[:SAMPLE_CHARACTERS]
