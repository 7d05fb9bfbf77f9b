"""The options of a run, defined once: parser, help, validation and record all follow from this Struct."""

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
    """Describe one field: its help text, its one-letter form, and how its text is read.

    `names` are separated by commas; a `range` is what `orchestrator.cli.ranges` reads; a `share` may be given
    in percent.
    """
    return Meta(description=help, extra={"short": short, "form": form})


class Sweep(msgspec.Struct, frozen=True, kw_only=True):
    """Workloads listed separately in a plan file: every combination of these values.

    If a field is None, the option of the same name applies. `precision` restricts them to those precisions.
    """

    precision: list[str] | None = None
    batch_size: list[Count] | None = None
    prompt_tokens: list[Count] | None = None
    depth: list[Depth] | None = None
    new_tokens: list[Count] | None = None
    decode: list[DecodeMode] | None = None


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure. A field `new_tokens` is the option `--new-tokens`; its Meta is the help.

    A field without Meta can only be set in a plan file.
    """

    all: Annotated[bool, option("Measure every precision that can run here.")] = False
    precision: Annotated[list[str], option("Measure these precisions; repeatable.", "-p", form="names")] = []
    model: Annotated[
        str | None,
        option(
            "Hub id, local folder, GGUF file, random:NAME or random:CONFIG.json. Default: "
            "Qwen/Qwen2.5-0.5B-Instruct if available, else the embedded SmolLM2-135M-Instruct.",
            "-m",
        ),
    ] = None
    workers: Annotated[
        str | None,
        option("Folder with your own precisions, one worker file each; CONTRIBUTING.md shows how."),
    ] = None
    checkpoint: Annotated[
        dict[str, str], option("Already quantized weights for a precision: NAME=FOLDER_OR_HUB_ID.")
    ] = {}
    calibration: Annotated[
        str | None,
        option(
            "Text file to calibrate weights with, for precisions that need it. Default: the included text."
        ),
    ] = None
    python: Annotated[dict[str, str], option("Run a precision under another interpreter: NAME=PATH.")] = {}
    device: Annotated[str, option("cpu, cuda, cuda:N, or auto (the first GPU, else the CPU).")] = "auto"
    prompts: Annotated[
        str | None, option("Text file with one prompt per line. Default: the 20 included prompts.")
    ] = None
    decode: Annotated[
        list[DecodeMode] | None,
        option(
            "How decode steps are launched, one row each: eager, graph (one CUDA graph per step), compile "
            "(torch.compile), generate (transformers' own). Default: eager,graph on a GPU, eager on a CPU.",
            form="names",
        ),
    ] = None
    prompt_tokens: Annotated[
        list[Count] | None,
        option(
            "Cut or repeat every prompt to exactly this many tokens; several, or 128-2048*2, one row each.",
            form="range",
        ),
    ] = None
    depth: Annotated[
        list[Depth] | None,
        option(
            "Tokens of context before the prompt, untimed; several, or 0-4096+1024, one row each.",
            form="range",
        ),
    ] = None
    # A single count in records from before there could be several.
    new_tokens: Annotated[
        list[Count] | Count,
        option("Tokens to generate per prompt; several, or 16-256*2, one row each.", form="range"),
    ] = 128
    batch_size: Annotated[
        list[Count] | Count,
        option("Prompts generated together; several, or 1-64*2, one row each.", form="range"),
    ] = 1
    warmup: Annotated[
        Annotated[int, Meta(ge=0, le=1000)],
        option("Minimum number of untimed trials; more follow until two in a row agree or 5 s are spent."),
    ] = 1
    cooldown: Annotated[
        Annotated[float, Meta(ge=0, le=3600)], option("Seconds to wait before every row but the first.")
    ] = 0
    rounds: Annotated[
        Annotated[int, Meta(ge=1, le=1000)],
        option(
            "How many times to measure each precision, each time in a fresh process and in a different "
            "order. Ratios then have an interval, and from 5 rounds on a verdict."
        ),
    ] = 1
    precise: Annotated[
        Annotated[float, Meta(gt=0, lt=1)] | None,
        option(
            "Add rounds until every ratio's interval is within this, e.g. 1%, or --budget is spent.",
            form="share",
        ),
    ] = None
    aa: Annotated[
        bool, option("Measure FP16 twice in every round: how much it differs from itself is noise.")
    ] = False
    seed: Annotated[
        Annotated[int, Meta(ge=0)], option("Seed of random weights and of the order in each round.")
    ] = 0
    outliers: Annotated[
        Annotated[int, Meta(ge=0, le=128)],
        option("Outlier features to plant in the activations of random weights, for LLM.int8 to find."),
    ] = 0
    budget: Annotated[
        Seconds | None,
        option(
            "Seconds that measuring may take, shared among the precisions; what does not fit is left out and "
            "listed. Default: 210 on a CPU, none on a GPU."
        ),
    ] = None
    timeout: Annotated[
        Seconds, option("Seconds after which a worker is terminated, preparation included.")
    ] = 3600
    out: Annotated[
        str | None,
        option("Run folder to write; it must not contain a run yet. Default: qbench-runs/TIME-MODEL."),
    ] = None
    workloads: list[Sweep] = []
    """If there are any, only these are measured."""
