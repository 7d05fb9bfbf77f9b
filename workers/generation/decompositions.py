"""Decompositions for Inductor: a decode step's matrix products and argmax as reductions.

Each function stands for an ATen operator and returns NotImplemented for shapes that are better left alone.
"""

import torch

MAX_GEMV_ROWS = 16
"""Rows of a product beyond which the code of its reductions would grow too long."""
LONG_DIMENSION = 8192
"""Length from which a sum is split into two halves, and an argmax into two stages."""
ARGMAX_CHUNKS = 256
"""Chunks of a long argmax. Each gets its own thread block in the first stage."""


def mm_as_reductions(vectors: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """(rows, k) × (k, n) as one reduction per row; all rows share one read of the matrix."""
    if vectors.shape[0] > MAX_GEMV_ROWS:
        return NotImplemented
    if vectors.shape[0] == 1:
        return _gemv(vectors, matrix)
    # Strided inputs are materialized first; otherwise Inductor might materialize every product term.
    materialized = vectors.as_strided(vectors.shape, vectors.stride())
    return torch.cat([_gemv(vector, matrix) for vector in materialized.split(1)])


def addmm_as_reductions(
    bias: torch.Tensor, vectors: torch.Tensor, matrix: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    """`mm_as_reductions` plus a bias, if neither is scaled."""
    product = mm_as_reductions(vectors, matrix) if beta == alpha == 1 else NotImplemented
    return product if product is NotImplemented else product + bias


def two_stage_argmax(values: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> torch.Tensor:
    """Argmax over a long last dimension, such as a vocabulary: within chunks, then across them.

    In one stage a single thread block does all the work, which takes 28 of the 5,221 µs of a step of
    Qwen2.5-7B in FP16 (`results/h100-best-7b`).
    """
    count = values.shape[-1] if values.dim() else 0
    if dim not in (-1, values.dim() - 1) or count < LONG_DIMENSION or count % ARGMAX_CHUNKS:
        return NotImplemented
    best, offset = values.unflatten(-1, (ARGMAX_CHUNKS, count // ARGMAX_CHUNKS)).max(-1)
    chunk = best.argmax(-1, keepdim=True)
    found = chunk * (count // ARGMAX_CHUNKS) + offset.gather(-1, chunk)
    return found if keepdim else found.squeeze(-1)


def _gemv(vector: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """(1, k) × (k, n), accumulated in float32 as a matrix kernel would."""
    terms = vector.float().unsqueeze(2) * matrix.float().unsqueeze(0)
    count, outputs = matrix.shape
    if count >= LONG_DIMENSION and count % 2 == 0:
        terms = terms.view(2, count // 2, outputs).sum(dim=1).unsqueeze(0)
    return terms.sum(dim=1).to(vector.dtype)
