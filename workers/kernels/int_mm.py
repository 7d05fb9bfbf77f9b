"""Products of INT8 matrices with any number of rows.

On a GPU `torch._int_mm` needs at least 17 rows. For fewer, torchao prints its input to find out whether it is
being traced, which copies it to the host element by element, and then multiplies in FP32; when traced it
calls that kernel anyway. On a CPU with AMX, `torch._int_mm` misreads a single row whose stride isn't its
width, as torch.compile produces (torch 2.13). Here rows are padded: a product reads each weight once, padded
or not.
"""

import torch

MIN_ROWS = 17


def int_mm(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """(n, k) × (k, m) in INT8 to (n, m) in INT32."""
    missing = max(0, MIN_ROWS - rows.shape[0])
    padded = torch.nn.functional.pad(rows, (0, 0, 0, missing))
    return torch._int_mm(padded, matrix)[: rows.shape[0]]


def scaled_int_mm(rows: torch.Tensor, matrix: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The same times a scale for each row, of shape (n, 1) or (1, 1), in the scales' dtype."""
    return int_mm(rows, matrix).to(scales.dtype) * scales
