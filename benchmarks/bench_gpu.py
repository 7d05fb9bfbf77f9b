"""How fast the decode modes are on one GPU, next to their targets: `make bench-gpu`, or this script.

    python benchmarks/bench_gpu.py FOLDER          measure into FOLDER, then print
    python benchmarks/bench_gpu.py FOLDER --print  print what FOLDER contains

The targets are for an H100, and missing one is not a failure. Host-bound figures (eager, generate) vary with
the host, so the fastest tenth of their tokens is compared as well. `results/h100-modes` was made this way.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles

from orchestrator.analysis.metrics import CellMetrics, measure_cell
from orchestrator.records.store import read_run
from orchestrator.units import percent, rate, ratio
from schemas.frames import Done
from schemas.record import CellRecord

PROMPTS = ["one", "two", "three"]
"""Random weights take random prompts, so only the number of prompts matters."""
RUNS = {
    "7b": ["random:qwen2.5-7b", "--decode", "generate,eager,graph,compile"],
    "7b-prompts": ["random:qwen2.5-7b", "--decode", "graph", "--prompt-tokens", "64,2048"],
    "0.5b": ["random:qwen2.5-0.5b", "--decode", "generate,eager,graph,compile"],
}

Cells = dict[tuple[str, int | None], tuple[CellRecord, CellMetrics]]
"""(decode mode, prompt tokens) → a measured cell and its row."""


def measure(folder: Path, names: list[str]) -> None:
    """Measure each run into its own folder, even if an earlier one fails."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    for name in names:
        command = [sys.executable, "-m", "orchestrator", "-p", "fp16", "-m", *RUNS[name]]
        options = ["--prompts", str(prompts), "--new-tokens", "64", "--out", str(folder / name), "--verbose"]
        subprocess.run([*command, *options])


def read(folder: Path) -> Cells:
    """The measured cells of a run; none if it wasn't measured."""
    if not (folder / "plan.json").exists():
        return {}
    run = read_run(folder)
    return {
        (cell.job.workload.decode, cell.job.workload.prompt_tokens): (cell, measure_cell(cell, run.peaks))
        for cell in run.cells
        if cell.job is not None and isinstance(cell.outcome, Done)
    }


def lines(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Figure, value and target."""
    for size, graph_target, compile_target in (("7b", "2.80×", "MBU 75%"), ("0.5b", "6.00×", "700 tok/s")):
        cells = read(folder / size)
        eager, generate = cells.get(("eager", None)), cells.get(("generate", None))
        graph, compiled = cells.get(("graph", None)), cells.get(("compile", None))
        if eager and generate:
            yield f"{size} eager / generate()", _versus(eager, generate), "1.00×"
        if eager and graph:
            yield f"{size} graph / eager", _versus(graph, eager), graph_target
            yield f"{size} graph, spread over trials", _spread(graph[0]), "0.5%"
        if compiled:
            row = compiled[1]
            reached = f"{rate(row.decode_tok_s)} tok/s, MBU {percent(row.decode_mbu)}"
            yield f"{size} compile", reached, compile_target
    prompts = read(folder / "7b-prompts")
    first, again = read(folder / "7b").get(("graph", None)), prompts.get(("graph", 64))
    if first and again:
        difference = abs((again[1].decode_tok_s or 0) / (first[1].decode_tok_s or 1) - 1)
        yield "7b graph, between processes", f"{difference:.2%}", "0.5%"
    if long := prompts.get(("graph", 2048)):
        ttft = f"{(long[1].ttft_s or 0) * 1e3:.1f} ms"
        yield "7b prefill of 2,048 tokens", f"MFU {percent(long[1].prefill_mfu)}, {ttft}", "MFU 60%"


def _versus(one: tuple[CellRecord, CellMetrics], other: tuple[CellRecord, CellMetrics]) -> str:
    whole = (one[1].decode_tok_s or 0) / (other[1].decode_tok_s or 1)
    fastest = _fastest_tenth_s(other[0]) / _fastest_tenth_s(one[0])
    speeds = f"{rate(one[1].decode_tok_s)} / {rate(other[1].decode_tok_s)} tok/s"
    return f"{ratio(whole)} ({speeds}; by the fastest tenth of tokens {ratio(fastest)})"


def _fastest_tenth_s(cell: CellRecord) -> float:
    return quantiles([seconds for trial in cell.trials for seconds in trial.token_s], n=10)[0]


def _spread(cell: CellRecord) -> str:
    rates = [len(trial.token_s) / trial.decode_s for trial in cell.trials]
    return f"{(max(rates) - min(rates)) / median(rates):.2%}"


if __name__ == "__main__":
    folder, *rest = map(Path, sys.argv[1:])
    if Path("--print") not in rest:
        measure(folder, [str(name) for name in rest] or list(RUNS))
    for asked, reached, target in lines(folder):
        print(f"{asked:28} {target:>10}   {reached}")
