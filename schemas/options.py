"""The options of a run, said once: parser, help, validation and record all follow from this Struct."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from schemas.job import DecodeMode

Count = Annotated[int, Meta(ge=1, le=131_072)]
Seconds = Annotated[float, Meta(gt=0)]


Depth = Annotated[int, Meta(ge=0, le=131_072)]


def option(
    help: str, short: str | None = None, form: Literal["names", "range", "share"] | None = None
) -> Meta:
    """Describe one field: its help text, its one-letter form, and how several values stand in one text.

    `names` are parted by commas; a `range` is what `orchestrator.cli.ranges` reads; a `share` may be in
    percent.
    """
    return Meta(description=help, extra={"short": short, "form": form})


class Sweep(msgspec.Struct, frozen=True, kw_only=True):
    """Workloads that a plan file lists by themselves: every combination of these values.

    For what is None the option of the same name holds; those that `precision` names alone have them.
    """

    precision: list[str] | None = None
    batch_size: list[Count] | None = None
    prompt_tokens: list[Count] | None = None
    depth: list[Depth] | None = None
    new_tokens: list[Count] | None = None
    decode: list[DecodeMode] | None = None


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure. A field `new_tokens` is the option `--new-tokens`; its Meta is the help.

    A field without Meta can be had in a plan file alone.
    """

    all: Annotated[bool, option("Measure every precision that can run here.")] = False
    precision: Annotated[list[str], option("Measure these precisions; repeatable.", "-p", form="names")] = []
    model: Annotated[
        str | None,
        option(
            "Hub id, local folder, GGUF file, random:NAME or random:CONFIG.json. Default: "
            "Qwen/Qwen2.5-0.5B-Instruct where it can be had, else the embedded SmolLM2-135M-Instruct.",
            "-m",
        ),
    ] = None
    workers: Annotated[
        str | None,
        option("Folder with precisions of your own, one worker file each; CONTRIBUTING shows how."),
    ] = None
    checkpoint: Annotated[
        dict[str, str], option("Ready quantized weights for a precision: NAME=FOLDER_OR_HUB_ID.")
    ] = {}
    calibration: Annotated[
        str | None,
        option("Text file to calibrate weights with, where a precision needs that. Default: our own."),
    ] = None
    python: Annotated[dict[str, str], option("Run a precision under another interpreter: NAME=PATH.")] = {}
    device: Annotated[str, option("cpu, cuda, cuda:N, or auto (the first GPU, else the CPU).")] = "auto"
    prompts: Annotated[
        str | None, option("Text file with one prompt a line. Default: 20 prompts of our own.")
    ] = None
    decode: Annotated[
        list[DecodeMode] | None,
        option(
            "How decode steps are issued, each a row: eager, graph (one CUDA graph a step), compile "
            "(torch.compile), generate (transformers' own). Default: eager,graph on a GPU, eager on a CPU.",
            form="names",
        ),
    ] = None
    prompt_tokens: Annotated[
        list[Count] | None,
        option(
            "Cut or repeat every prompt to exactly this many tokens; several, or 128-2048*2, each a row.",
            form="range",
        ),
    ] = None
    depth: Annotated[
        list[Depth] | None,
        option(
            "Tokens of context before the prompt, untimed; several, or 0-4096+1024, each a row.", form="range"
        ),
    ] = None
    # A single count in records of before it could be several.
    new_tokens: Annotated[
        list[Count] | Count,
        option("Tokens to generate per prompt; several, or 16-256*2, each a row.", form="range"),
    ] = 128
    batch_size: Annotated[
        list[Count] | Count,
        option("Prompts generated together; several, or 1-64*2, each a row.", form="range"),
    ] = 1
    warmup: Annotated[
        Annotated[int, Meta(ge=0, le=1000)],
        option("Fewest untimed trials; more are made until two in a row agree, or 5 s are spent."),
    ] = 1
    cooldown: Annotated[
        Annotated[float, Meta(ge=0, le=3600)], option("Seconds to wait before every row but the first.")
    ] = 0
    rounds: Annotated[
        Annotated[int, Meta(ge=1, le=1000)],
        option(
            "How often to measure each precision, in a fresh process and in another order each time. Ratios "
            "then have an interval, and from 5 rounds on a verdict."
        ),
    ] = 1
    precise: Annotated[
        Annotated[float, Meta(gt=0, lt=1)] | None,
        option(
            "Go on with rounds until every ratio's interval is within this, e.g. 1%, or --budget is spent.",
            form="share",
        ),
    ] = None
    aa: Annotated[
        bool, option("Measure FP16 twice in every round: by how much it differs from itself is noise.")
    ] = False
    seed: Annotated[
        Annotated[int, Meta(ge=0)], option("Seed of random weights, and of the order in each round.")
    ] = 0
    outliers: Annotated[
        Annotated[int, Meta(ge=0, le=128)],
        option("Outlier features to plant in the activations of random weights, for LLM.int8 to find."),
    ] = 0
    budget: Annotated[
        Seconds | None,
        option(
            "Seconds the measuring may take, shared out among the precisions; what does not fit is left "
            "out and named. Default: 210 on a CPU, none on a GPU."
        ),
    ] = None
    timeout: Annotated[Seconds, option("Seconds after which a worker is ended, preparation included.")] = 3600
    out: Annotated[
        str | None,
        option("Run folder to write; it must not hold a run yet. Default: qbench-runs/TIME-MODEL."),
    ] = None
    workloads: list[Sweep] = []
    """Where there are any, they alone are measured."""
