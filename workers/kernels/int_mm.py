"""Products of INT8 matrices, of however few rows.

On a GPU `torch._int_mm` takes no fewer than 17. For fewer, torchao prints its input to learn whether it is
being traced, which copies it to the host number by number, and then multiplies in FP32; where it is traced it
calls that kernel all the same. On a CPU with AMX it takes a single row whose stride isn't its width, as
torch.compile makes it, for other numbers than it holds (torch 2.13). Here rows are padded: one product reads
each weight once, padded or not.
"""

import torch

FEWEST_ROWS = 17


def int_mm(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """(n, k) × (k, m) in INT8 to (n, m) in INT32."""
    missing = max(0, FEWEST_ROWS - rows.shape[0])
    padded = torch.nn.functional.pad(rows, (0, 0, 0, missing))
    return torch._int_mm(padded, matrix)[: rows.shape[0]]


def scaled_int_mm(rows: torch.Tensor, matrix: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The same times a scale for each row, of shape (n, 1) or (1, 1), in the scales' dtype."""
    return int_mm(rows, matrix).to(scales.dtype) * scales
