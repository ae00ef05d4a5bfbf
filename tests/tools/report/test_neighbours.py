"""Rankings: what changed, and which changes are ties."""

from __future__ import annotations

import pytest
import torch

from fusedformer.tools.report.neighbours import compare_rankings, similarities


@pytest.fixture
def truth() -> torch.Tensor:
    rows = torch.randn(30, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return similarities(torch.nn.functional.normalize(rows, dim=-1))


def neighbours(matrix: torch.Tensor, row: int) -> list[int]:
    order = matrix[row].clone()
    order[row] = -2.0
    return order.argsort(descending=True).tolist()


def exchanged(matrix: torch.Tensor, row: int, first: int, second: int) -> torch.Tensor:
    """``matrix`` with two places of one row's ranking exchanged."""
    changed, order = matrix.clone(), neighbours(matrix, row)
    a, b = order[first], order[second]
    changed[row, a], changed[row, b] = matrix[row, b], matrix[row, a]
    return changed


def test_nothing_changed(truth: torch.Tensor) -> None:
    found = compare_rankings(truth, truth, tie=0.0)
    assert (found.top1_unchanged, found.top10_unchanged, found.top10_same_set) == (30, 30, 30)
    assert (found.ties, found.beyond_rounding) == (0, 0)


@pytest.mark.parametrize(
    ("places", "top1", "top10", "same_set"),
    [((0, 1), 29, 29, 30), ((3, 7), 30, 29, 30), ((9, 10), 30, 29, 29), ((11, 12), 30, 30, 30)],
    ids=["the nearest", "inside the ten", "into the ten", "beyond the ten"],
)
def test_a_planted_exchange_is_counted(
    truth: torch.Tensor, places: tuple[int, int], top1: int, top10: int, same_set: int
) -> None:
    found = compare_rankings(exchanged(truth, 5, *places), truth, tie=0.0)
    assert (found.top1_unchanged, found.top10_unchanged) == (top1, top10)
    assert found.top10_same_set == same_set
    assert found.ties == 0
    assert found.beyond_rounding == 30 - top10


def test_a_tie_is_told_from_a_change(truth: torch.Tensor) -> None:
    order = neighbours(truth, 5)
    gap = (truth[5, order[0]] - truth[5, order[1]]).item()
    changed = exchanged(truth, 5, 0, 1)
    above = compare_rankings(changed, truth, tie=gap * 1.001)
    below = compare_rankings(changed, truth, tie=gap * 0.999)
    assert (above.ties, above.beyond_rounding) == (1, 0)
    assert (below.ties, below.beyond_rounding) == (0, 1)


def test_a_passage_is_not_its_own_neighbour(truth: torch.Tensor) -> None:
    changed = truth.clone().fill_diagonal_(-1.0)
    assert compare_rankings(changed, truth, tie=0.0).top10_unchanged == 30


def test_fewer_passages_than_ten() -> None:
    matrix = similarities(torch.eye(3))
    assert compare_rankings(matrix, matrix, tie=0.0).top10_unchanged == 3
