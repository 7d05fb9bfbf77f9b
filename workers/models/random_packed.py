"""Random weights of four-bit formats: packed integers with scales, as many bytes as real ones, in no time."""

import math

import torch

ZERO_POINTS_OF_8 = 0x88888888 - 2**32
"""Eight 4-bit zero points of 8, as a signed 32-bit integer."""
DEVIATION_OF_INT4 = math.sqrt((16**2 - 1) / 12)
"""Standard deviation of a uniform integer from 0 to 15."""


def random_packed(
    name: str, like: torch.Tensor, deviation: float, generator: torch.Generator
) -> torch.Tensor:
    """A tensor of `like`'s shape and dtype for the `qweight`, `qzeros` or `scales` that `name` ends with.

    Scales are such that a uniform 4-bit integer around the zero point 8 has the `deviation` that the
    architecture's own initialisation has.
    """
    if name.endswith("qweight"):
        bounds = torch.iinfo(torch.int32)
        return torch.randint(
            bounds.min,
            bounds.max,
            like.shape,
            dtype=torch.int32,
            device=generator.device,
            generator=generator,
        )
    if name.endswith("qzeros"):
        return torch.full(like.shape, ZERO_POINTS_OF_8, dtype=torch.int32, device=generator.device)
    return torch.full(like.shape, deviation / DEVIATION_OF_INT4, dtype=like.dtype, device=generator.device)
