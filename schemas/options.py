"""The options of a run. Parser, help, validation and record are all derived from one Struct."""

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
    """Describe a field: its help text, its one-letter flag, and the form of its value on the command line.

    `names` are separated by commas, a `range` is parsed by `orchestrator.cli.ranges`, and a `share` may be a
    percentage.
    """
    return Meta(description=help, extra={"short": short, "form": form})


class Sweep(msgspec.Struct, frozen=True, kw_only=True):
    """A `[[workloads]]` table of a plan file: every combination of these values is measured.

    None means the value of the option of the same name, and for `precision` all the run's precisions.
    """

    precision: list[str] | None = None
    batch_size: list[Count] | None = None
    prompt_tokens: list[Count] | None = None
    depth: list[Depth] | None = None
    new_tokens: list[Count] | None = None
    decode: list[DecodeMode] | None = None


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure. The field `new_tokens` is the option `--new-tokens`; its Meta has the help text.

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
        option("Folder of your own precisions, one worker file each; see docs/precisions.md."),
    ] = None
    checkpoint: Annotated[
        dict[str, str], option("Use already quantized weights for a precision: NAME=FOLDER_OR_HUB_ID.")
    ] = {}
    calibration: Annotated[
        str | None,
        option("Text file for precisions that calibrate their weights. Default: a built-in text."),
    ] = None
    python: Annotated[dict[str, str], option("Run a precision with another interpreter: NAME=PATH.")] = {}
    device: Annotated[str, option("cpu, cuda, cuda:N, or auto (the first GPU, else the CPU).")] = "auto"
    prompts: Annotated[
        str | None, option("Text file with one prompt per line. Default: 20 built-in prompts.")
    ] = None
    decode: Annotated[
        list[DecodeMode] | None,
        option(
            "How decode steps are issued, one row per mode: eager, graph (one CUDA graph per step), compile "
            "(torch.compile), generate (transformers' own). Default: eager,graph on a GPU, eager on a CPU.",
            form="names",
        ),
    ] = None
    prompt_tokens: Annotated[
        list[Count] | None,
        option(
            "Cut or repeat every prompt to exactly this many tokens; a list or a range like 128-2048*2 gives "
            "a row per value.",
            form="range",
        ),
    ] = None
    depth: Annotated[
        list[Depth] | None,
        option(
            "Untimed tokens of context before the prompt; a list or a range like 0-4096+1024 gives a row per "
            "value.",
            form="range",
        ),
    ] = None
    # Older records have a single count.
    new_tokens: Annotated[
        list[Count] | Count,
        option(
            "Tokens to generate per prompt; a list or a range like 16-256*2 gives a row per value.",
            form="range",
        ),
    ] = 128
    batch_size: Annotated[
        list[Count] | Count,
        option("Prompts per batch; a list or a range like 1-64*2 gives a row per value.", form="range"),
    ] = 1
    warmup: Annotated[
        Annotated[int, Meta(ge=0, le=1000)],
        option("Minimum number of untimed trials; more follow until two in a row agree or 5 s have passed."),
    ] = 1
    cooldown: Annotated[
        Annotated[float, Meta(ge=0, le=3600)], option("Seconds to wait before each row after the first.")
    ] = 0
    rounds: Annotated[
        Annotated[int, Meta(ge=1, le=1000)],
        option(
            "Measure each precision this many times, each time in a fresh process and a new order. Ratios "
            "then have confidence intervals and, from 5 rounds, verdicts."
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
        bool, option("Measure FP16 twice per round: the difference between the two is the noise floor.")
    ] = False
    seed: Annotated[
        Annotated[int, Meta(ge=0)],
        option("Seed for random weights and for the order of precisions within rounds."),
    ] = 0
    outliers: Annotated[
        Annotated[int, Meta(ge=0, le=128)],
        option("Outlier features to plant in the activations of random weights, for LLM.int8 to find."),
    ] = 0
    budget: Annotated[
        Seconds | None,
        option(
            "Seconds to measure for, divided among the precisions; what does not fit is skipped and listed. "
            "Default: 210 on a CPU, none on a GPU."
        ),
    ] = None
    timeout: Annotated[Seconds, option("Seconds before a worker is killed, preparation included.")] = 3600
    out: Annotated[
        str | None,
        option("Run folder to create; must not hold a run already. Default: qbench-runs/TIME-MODEL."),
    ] = None
    workloads: list[Sweep] = []
    """If there are any, only these are measured."""
