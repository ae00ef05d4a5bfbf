"""Make tensors without memory, on which the compile cases call launchers."""

from __future__ import annotations

import torch

HALF = torch.bfloat16
DEVICE = "meta"  # tests have others


def empty(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    """Make a tensor that nobody reads."""
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def empty_seed() -> torch.Tensor:
    """Make what stands for the seed of a dropout."""
    return empty(1, dtype=torch.int64)
