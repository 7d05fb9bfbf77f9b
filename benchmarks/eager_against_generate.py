"""Our eager loop against transformers' `generate()`, cell by cell in turn in one worker.

    python benchmarks/eager_against_generate.py FOLDER [MODEL]

Variation of the host's speed then affects both alike. The median over the pairs should be at least 1, since
our loop does less than `generate()` around the same model. On an H100 it was 1.18 (`results/h100-eager`).
"""

import sys
from pathlib import Path
from statistics import median

from one_worker import one_worker

from schemas.record import CellRecord

PAIRS = 5
PROMPTS = 2
NEW_TOKENS = 96


def tok_s(record: CellRecord) -> float:
    """Over all decode steps of a cell."""
    steps = sum(len(trial.token_s) for trial in record.trials)
    return steps / sum(trial.decode_s for trial in record.trials)


if __name__ == "__main__":
    path, model = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "random:qwen2.5-0.5b"
    ratios = []
    with one_worker(path, model, PROMPTS, ["eager", "generate"], NEW_TOKENS) as one:
        for _ in range(PAIRS):
            eager, generate = (tok_s(one.measure(cell)) for cell in one.cells)
            ratios.append(eager / generate)
            print(f"eager {eager:.1f} tok/s, generate() {generate:.1f}: {ratios[-1]:.2f}×", flush=True)
    print(f"median of {PAIRS} pairs: {median(ratios):.2f}×")
