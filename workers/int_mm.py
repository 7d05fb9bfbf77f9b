"""Products of INT8 matrices on a GPU, of however few rows.

`torch._int_mm` takes no fewer than 17. For fewer, torchao prints its input to learn whether it is being
traced, which copies it to the host number by number, and then multiplies in FP32; where it is traced it calls
that kernel all the same. Here the rows are padded: one product reads each weight once, padded or not.
"""

import torch

FEWEST_ROWS = 17


def int_mm(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """(n, k) × (k, m) in INT8 to (n, m) in INT32."""
    missing = max(0, FEWEST_ROWS - rows.shape[0])
    padded = torch.nn.functional.pad(rows, (0, 0, 0, missing))
    return torch._int_mm(padded, matrix)[: rows.shape[0]]
