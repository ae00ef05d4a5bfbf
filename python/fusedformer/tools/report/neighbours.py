"""Check that nearest neighbours by cosine stay the same, but for ties."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranking:
    """How many of ``passages`` keep their neighbours, against the float64 truth.

    Attributes:
        passages: number of passages, each ranked against all others.
        top1_unchanged: those with the same nearest neighbour.
        top10_unchanged: those with the same ten nearest, in the same order.
        top10_same_set: those with the same ten nearest, in any order.
        ties: changed passages whose every changed place is a tie below rounding: the true
            similarities of the two passages differ by no more than ``tie`` allows.
        beyond_rounding: the other changed passages.
        tie: the largest difference of similarities that counts as a tie.
    """

    passages: int
    top1_unchanged: int
    top10_unchanged: int
    top10_same_set: int
    ties: int
    beyond_rounding: int
    tie: float


def similarities(embeddings: Tensor) -> Tensor:
    """Compute cosines ``[N, N]`` in float64 of embeddings ``[N, d]`` of length 1."""
    wide = embeddings.double()
    return wide @ wide.T


def compare_rankings(candidate: Tensor, truth: Tensor, tie: float, top: int = 10) -> Ranking:
    """Compare each passage's nearest neighbours by two matrices of similarities.

    Args:
        candidate, truth: ``[N, N]``, N at least 2; the diagonal does not count.
        tie: difference of true similarities up to which an exchange is a tie below rounding.
        top: how many neighbours are compared (fewer if there are not as many).
    """
    passages = truth.shape[0]
    top = min(top, passages - 1)
    ours, right = (_nearest(matrix, top) for matrix in (candidate, truth))
    same = ours == right
    gap = (truth.gather(1, right) - truth.gather(1, ours)).abs()
    changed = ~same.all(1)
    tied = (same | (gap <= tie)).all(1)
    return Ranking(
        passages=passages,
        top1_unchanged=int(same[:, 0].sum()),
        top10_unchanged=int((~changed).sum()),
        top10_same_set=int((ours.sort(1).values == right.sort(1).values).all(1).sum()),
        ties=int((changed & tied).sum()),
        beyond_rounding=int((changed & ~tied).sum()),
        tie=tie,
    )


def _nearest(matrix: Tensor, top: int) -> Tensor:
    others = matrix.clone().fill_diagonal_(-torch.inf)
    return others.sort(dim=1, descending=True, stable=True).indices[:, :top]
