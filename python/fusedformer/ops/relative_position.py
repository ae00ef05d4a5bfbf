"""Look up T5's buckets of relative positions by distance; small, so by ATen everywhere."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def relative_position_bias(weight: Tensor, bidirectional: bool, max_distance: int) -> Tensor:
    """See :func:`fusedformer.functional.relative_position_bias`."""
    distance = torch.arange(-max_distance, max_distance + 1, device=weight.device)
    buckets = weight.shape[0]
    first = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        first = torch.where(distance > 0, buckets, 0)
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    # In float32 and in T5's order of steps, so that the edges of buckets do not move.
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    wide = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return F.embedding(first + torch.where(distance < exact, distance, wide), weight).t()
