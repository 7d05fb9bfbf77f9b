"""The cost of sampling memory to the worker: eager decode with the sampler switched on and off in turn.

    python benchmarks/sampler_cost.py FOLDER [MODEL]

Eager decode is affected first, since the host sets its pace. But host speed varies by a fifth from cell to
cell, far more than the effect, so the sampler is on for a fifth of a second and off for the next throughout
one cell. Each interval with the sampler is compared with its two neighbors, which removes a steady drift. The
result is the median over all intervals; it should stay under 0.5 %. Unless MODEL is given, Qwen2.5-0.5B's
shapes are cut to two layers: ten times as many tokens in the same time make the noise a third as large.

On an H100 it was −0.39 %, with a 95 % interval of −0.98 % to +0.46 % (`results/h100-sampler-shallow`).

    python benchmarks/sampler_cost.py FOLDER --print   computes it again from the records in FOLDER
"""

import json
import sys
import time
from collections import defaultdict
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median
from unittest.mock import patch

from one_worker import one_worker
from scipy.stats import bootstrap

from orchestrator.execution.observation import Observation
from orchestrator.hardware.sampler import MemorySource
from orchestrator.planning.models import CONFIGS_FOLDER
from orchestrator.records.store import read_run
from schemas.frames import AnyFrame, Ready
from schemas.record import CellRecord, MemoryReading

INTERVAL_NS = 200_000_000
PROMPTS = 12
NEW_TOKENS = 2000
LAYERS = 2


class OnAndOff:
    """A source that makes its sampler sleep through every second interval of the monotonic clock."""

    def __init__(self, source: MemorySource) -> None:
        self.source = source
        self.name = source.name

    @property
    def enumerations(self) -> int:
        return self.source.enumerations

    def read(self, processes: bool) -> MemoryReading:
        now_ns = time.monotonic_ns()
        if not processes and not is_on(now_ns):
            time.sleep((INTERVAL_NS - now_ns % INTERVAL_NS) / 1e9)
        return self.source.read(processes)


class OnAndOffObservation(Observation):
    def add(self, frame: AnyFrame) -> None:
        super().add(frame)
        if isinstance(frame, Ready) and self.sampler:
            self.sampler.source = OnAndOff(self.sampler.source)


def is_on(at_ns: int) -> bool:
    return at_ns // INTERVAL_NS % 2 == 0


def shallow(path: Path) -> str:
    """Qwen2.5-0.5B with fewer layers; its config is written to the folder `path`."""
    config = json.loads((CONFIGS_FOLDER / "qwen2.5-0.5b.json").read_text())
    path.mkdir(parents=True, exist_ok=True)
    (path / "shallow.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS}))
    return f"random:{path / 'shallow.json'}"


def measure(path: Path, model: str) -> CellRecord:
    """One cell of FP16 in eager mode; its record goes to `path`."""
    with (
        patch("orchestrator.execution.worker_session.Observation", OnAndOffObservation),
        one_worker(path, model, PROMPTS, ["eager"], NEW_TOKENS) as one,
    ):
        return one.measure(one.cells[0])


def shifts(record: CellRecord) -> list[float]:
    """For each interval with the sampler, how much longer its tokens took than those of its neighbors."""
    began_ns = {edge.phase.trial: edge.phase.at_ns for edge in record.edges if edge.phase.name == "decode"}
    found = []
    for trial in record.trials:
        tokens_s: defaultdict[int, list[float]] = defaultdict(list)
        for token_s, until_s in zip(trial.token_s, accumulate(trial.token_s), strict=True):
            tokens_s[(began_ns[trial.index] + int(until_s * 1e9)) // INTERVAL_NS].append(token_s)
        mean_s = {interval: fmean(each) for interval, each in tokens_s.items()}
        for interval in mean_s:
            if is_on(interval * INTERVAL_NS) and {interval - 1, interval + 1} <= mean_s.keys():
                neighbors_s = (mean_s[interval - 1] + mean_s[interval + 1]) / 2
                found.append(mean_s[interval] / neighbors_s - 1)
    return found


if __name__ == "__main__":
    path, model = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None
    found = shifts(read_run(path).cells[0] if model == "--print" else measure(path, model or shallow(path)))
    interval = bootstrap((found,), median, vectorized=False, rng=0).confidence_interval
    print(
        f"{len(found)} intervals with the sampler on: {median(found):+.2%} a token in the median, "
        f"95 % interval {interval.low:+.2%} to {interval.high:+.2%}"
    )
