"""Look up buckets of relative positions by distance, T5's and DeBERTa's; small, so by ATen."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from fusedformer.ops.wide_sums import embedding


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
    return embedding(first + torch.where(distance < exact, distance, wide), weight).t()


_FAR = 1 << 29  # beyond all distances, and far from the ends of int32


class DistanceBuckets(NamedTuple):
    """DeBERTa's buckets of the distances of keys before queries; they never change."""

    by_distance: Tensor  # int32 [2R + 1]: entry R + distance; at -R and R are all beyond
    firsts: Tensor  # int32 [buckets + 1]: the first distance of each, and one beyond all


@functools.lru_cache(64)
def distance_buckets(span: int, max_distance: int, device: torch.device) -> DistanceBuckets:
    """Make the buckets 0 to ``2 * span - 1``.

    Args:
        span: distance 0 has this bucket; the first and the last have all distances beyond them.
        max_distance: distances above ``span // 2`` share logarithmically wider buckets up to about
            this one; 0: all have a bucket each.
        device: where to.
    """
    reach = max(max_distance, span)
    with torch.inference_mode(False):
        distance = torch.arange(-reach, reach + 1, device="cpu")  # so that all devices agree
        bucket = distance
        if max_distance:
            exact = span // 2
            # In float32, so that the edges of buckets are those of the published models.
            ratio = torch.log(distance.abs().clamp(min=exact).float() / exact)
            most = torch.tensor((max_distance - 1) / exact, dtype=torch.float32, device="cpu")
            ratio = ratio / torch.log(most)
            wide = torch.ceil(ratio * (exact - 1)).long() + exact
            bucket = torch.where(distance.abs() <= exact, distance, wide * distance.sign())
        bucket = (bucket + span).clamp(0, 2 * span - 1)
        firsts = torch.searchsorted(bucket, torch.arange(2 * span + 1, device="cpu")) - reach
        firsts[0], firsts[-1] = -_FAR, _FAR
        return DistanceBuckets(bucket.to(device, torch.int32), firsts.to(device, torch.int32))
