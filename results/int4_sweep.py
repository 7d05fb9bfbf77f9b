"""Which launch of `workers/int4_product.cu` is the fastest for the shapes of Qwen2.5-7B. On a GPU:

    PYTHONPATH=. python results/int4_sweep.py 8 16

prints, for so many rows, the microseconds of the best launches beside those of `plan` and of torch's kernel.
Each product has weights enough that no cache holds them, and is timed within a CUDA graph.
"""

import itertools
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from workers import int4_product
from workers.int4_product import GROUP, MOST_SHARED_BYTES, OUTPUTS, Launch, plan

SHAPES = {"keys": (512, 3584), "queries": (3584, 3584), "gate": (18944, 3584), "down": (3584, 18944)}
BEYOND_CACHE_BYTES = 200 << 20
REPLAYS = 5
SHOWN = 4


def median_us(product: Callable[[int], torch.Tensor], copies: int) -> float:
    product(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(copies):
            product(copy)
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(end) / copies)
    return sorted(times)[REPLAYS // 2]


def launches(rows: int, row_blocks: int, groups: int) -> list[Launch]:
    chosen = [
        Launch(rows, blocks_of_rows, warps, stages, blocks)
        for blocks_of_rows, warps, stages, blocks in itertools.product(
            (1, 2, 4, 6), (7, 14, 15, 28), (1, 2, 3), (1, 2)
        )
        if blocks_of_rows <= row_blocks and stages <= -(-groups // warps) and warps * blocks <= 32
    ]
    return [launch for launch in chosen if launch.shared_bytes * launch.blocks <= MOST_SHARED_BYTES]


def main() -> None:
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    for (name, (outputs, inputs)), rows in itertools.product(SHAPES.items(), map(int, sys.argv[1:])):
        groups, stored = inputs // GROUP, -(-inputs // 1024) * 1024 // GROUP
        planned = plan(rows, outputs // OUTPUTS, groups, multiprocessors)
        candidates = list({planned, *launches(rows, outputs // OUTPUTS, groups)})
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda launch: int4_product._kernel(0, groups, stored, launch), candidates))  # noqa: B023
        copies = -(-BEYOND_CACHE_BYTES // (outputs * inputs // 2))
        packed = [
            torch.randint(-(2**31), 2**31, (outputs // OUTPUTS, stored, 32, 4), device="cuda").int()
            for _ in range(copies)
        ]
        scales = torch.rand(stored, outputs, 2, device="cuda").bfloat16()
        x = torch.randn(rows, inputs, device="cuda").bfloat16()
        padded = torch.nn.functional.pad(x, (0, stored * GROUP - inputs))

        def torchs(copy: int) -> torch.Tensor:
            return torch.ops.aten._weight_int4pack_mm(padded, packed[copy], GROUP, scales)  # noqa: B023

        def ours(copy: int) -> torch.Tensor:
            return int4_product.int4_product(x, packed[copy], scales)  # noqa: B023

        times = {}
        for launch in candidates:
            int4_product.plan = lambda *_, launch=launch: launch
            times[launch] = median_us(ours, copies)
        best = ", ".join(
            f"{times[each]:.1f} {each[1:]}" for each in sorted(times, key=times.__getitem__)[:SHOWN]
        )
        told = f"torch {median_us(torchs, copies):.1f} µs, plan {times[planned]:.1f} {planned[1:]}"
        print(f"{name} × {rows}: {told}; best {best}", flush=True)


if __name__ == "__main__":
    main()
