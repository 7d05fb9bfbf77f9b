"""Random weights in packed INT4 formats: the bytes of real ones, without the time it takes to quantize."""

import math

import torch

ZERO_POINTS_OF_8 = 0x88888888 - 2**32
"""Eight 4-bit zero points of 8, as a signed 32-bit integer."""
DEVIATION_OF_INT4 = math.sqrt((16**2 - 1) / 12)
"""Standard deviation of a uniform integer from 0 to 15."""


def random_int4_tensor(
    name: str, like: torch.Tensor, deviation: float, generator: torch.Generator
) -> torch.Tensor:
    """A tensor with `like`'s shape and dtype for the `qweight`, `qzeros` or `scales` called `name`.

    Scales are chosen so that uniform 4-bit integers around the zero point 8 have the standard `deviation` of
    the architecture's own initialization.
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
