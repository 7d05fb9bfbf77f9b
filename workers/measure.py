"""What a worker does once it may import torch: load, warm up, time, and report the raw facts.

The seed benchmark's protocol: a few untimed trials, then every batch of prompts once, greedily. A
budget shortens the list of trials; only the first trial may itself end early, so that every precision
yields at least one figure.
"""

import importlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial

from transformers import PreTrainedTokenizerBase

from schemas.frames import Done, PhaseName, Ready, Trial
from schemas.job import Job, Workload
from workers.device import Device, open_device
from workers.generation import Generation, generate
from workers.inventory import take_inventory
from workers.prompts import Batch, make_batches
from workers.protocol import Channel, Load, LoadedModel, Unsupported

WARMUP_SHARE = 0.25
"""Part of a budget that warm-up may take."""
FEWEST_STEPS = 8
"""Decode steps of a timed trial that are made however late it is, since a rate from fewer says little."""
SAMPLE_CHARACTERS = 200


def measure(job: Job, load: Load, channel: Channel, began_ns: int) -> None:
    """Run the job from its imports to Done, sending frames as things happen.

    The budget, if there is one, counts from `began_ns` (monotonic).
    """
    deadline_ns = None if job.budget_s is None else began_ns + int(job.budget_s * 1e9)
    versions = _import_packages(job.packages)
    channel.enter("context")
    device = open_device(job)
    channel.send(_ready(device, versions))

    enter = partial(_enter, channel, device)
    enter("load")
    loaded = load(job)
    device.release_unused()
    channel.send(take_inventory(loaded.model))
    batches = make_batches(job, loaded.tokenizer, loaded.model.config.vocab_size)
    _check_context(loaded, batches, job.workload.new_tokens)

    enter("warmup")
    _warm_up(loaded, batches[0], job.workload, device, channel, deadline_ns)
    trials = []
    for trial in _trials(loaded, batches, job.workload.new_tokens, device, enter, deadline_ns):
        channel.send(trial)
        trials.append(trial)
    enter("end")
    channel.send(
        Done(
            at_ns=time.monotonic_ns(),
            trials_planned=len(batches),
            trials_measured=len(trials),
            sample_text=_text(loaded.tokenizer, trials[0].token_ids),
        )
    )


def _enter(channel: Channel, device: Device, phase: PhaseName, trial: int | None = None) -> None:
    channel.enter(phase, trial, device.memory())


def _warm_up(
    loaded: LoadedModel,
    batch: Batch,
    workload: Workload,
    device: Device,
    channel: Channel,
    deadline_ns: int | None,
) -> None:
    """Untimed trials, so that lazy initialisation and autotuning lie outside of every figure."""
    if deadline_ns is not None:
        now_ns = time.monotonic_ns()
        deadline_ns = now_ns + int(WARMUP_SHARE * max(deadline_ns - now_ns, 0))
    for index in range(workload.warmup):
        channel.report("warm-up", index, workload.warmup)
        generate(loaded.model, batch, workload.new_tokens, device, deadline_ns=deadline_ns)


def _trials(
    loaded: LoadedModel,
    batches: list[Batch],
    new_tokens: int,
    device: Device,
    enter: Callable[[PhaseName, int], None],
    deadline_ns: int | None,
) -> Iterator[Trial]:
    """One timed trial a batch, while the budget lasts; only the first may be cut short."""
    trial_ns = 0
    for index, batch in enumerate(batches):
        start_ns = time.monotonic_ns()
        if index and deadline_ns is not None and start_ns + trial_ns > deadline_ns:
            return
        enter("prefill", index)
        generation = generate(
            loaded.model,
            batch,
            new_tokens,
            device,
            between=partial(enter, "decode", index),
            deadline_ns=None if index else deadline_ns,
            fewest_steps=FEWEST_STEPS,
        )
        trial_ns = time.monotonic_ns() - start_ns
        yield _trial(index, batch, generation, new_tokens)


def _trial(index: int, batch: Batch, generation: Generation, new_tokens: int) -> Trial:
    rows, width = batch.ids.shape
    made = generation.token_ids.shape[1]
    if made != 1 + len(generation.token_s):
        raise RuntimeError(f"{made} tokens were emitted in {len(generation.token_s)} decode steps")
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
    )


def _check_context(loaded: LoadedModel, batches: list[Batch], new_tokens: int) -> None:
    room = getattr(loaded.model.config, "max_position_embeddings", None)
    needed = max(batch.ids.shape[1] for batch in batches) + new_tokens
    if room is not None and needed > room:
        raise Unsupported(
            f"{needed} tokens of prompt and answer exceed the model's {room}",
            "lower --prompt-tokens or --new-tokens",
        )


def _text(tokenizer: PreTrainedTokenizerBase | None, ids: list[int]) -> str | None:
    return None if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True)[:SAMPLE_CHARACTERS]


def _import_packages(packages: list[str]) -> dict[str, str]:
    """Import what the worker's header names, and tell the version of each."""
    versions = {}
    for package in packages:
        distribution = importlib.metadata.distribution(package)
        importlib.import_module(_module_name(distribution))
        versions[package] = distribution.version
    return versions


def _module_name(distribution: importlib.metadata.Distribution) -> str:
    """What to import for a distribution: `awq` for autoawq, most often just its name."""
    name = distribution.name.replace("-", "_")
    declared = (distribution.read_text("top_level.txt") or name).split()
    return name if name in declared else declared[0]


def _ready(device: Device, versions: dict[str, str]) -> Ready:
    return Ready(
        pid=os.getpid(),
        at_ns=time.monotonic_ns(),
        python=platform.python_version(),
        versions=versions,
        device=str(device.torch),
        device_name=device.name,
        device_uuid=device.uuid,
        allocator_settings=os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
    )
