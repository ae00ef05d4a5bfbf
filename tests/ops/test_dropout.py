"""The dropout mask: its statistics, and that it depends on (seed, plane, row, column) alone."""

from __future__ import annotations

import hashlib
import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from fusedformer import backend
from fusedformer import functional as F

SIGMAS = 4  # a fair mask lies beyond once in 16,000 draws; the seeds are fixed


def mask(
    seed: int, p: float, planes: int, rows: int, columns: int, device: str,
    of_attention: bool = False,
) -> Tensor:  # fmt: skip
    from fusedformer_kernels.rows.dropout import dropout_mask

    tensor = torch.tensor([seed], dtype=torch.int64, device=device)
    return dropout_mask(tensor, p, planes, rows, columns, of_attention)


def assert_rate(drawn: Tensor, rate: float) -> None:
    sigma = math.sqrt(rate * (1 - rate) / drawn.numel())
    assert abs(drawn.double().mean().item() - rate) <= SIGMAS * sigma


def assert_independent(a: Tensor, b: Tensor, keep: float) -> None:
    """Both kept as often as independence says: two masks that share draws keep far more."""
    assert_rate(a & b, keep * keep)


of_both = pytest.mark.parametrize("of_attention", [False, True], ids=["rows", "attention"])


@of_both
@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_keep_rate(p: float, of_attention: bool, device: str) -> None:
    keep = mask(1234567, p, 2, 64, 256, device, of_attention)
    assert_rate(keep, 1 - p)
    for part in (keep[0], keep[1], keep[:, 0], keep[:, :, 0], keep[:, :, 1::4], keep[..., 255]):
        assert_rate(part, 1 - p)


@of_both
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_are_independent(p: float, of_attention: bool, device: str) -> None:
    """Of columns (up to four at distance 1 or 8 come of one draw), rows (64: a tile), planes."""
    keep = mask(99, p, 12, 80, 128, device, of_attention)
    for distance in (1, 2, 3, 4, 8, 63, 64):
        assert_independent(keep[..., distance:], keep[..., :-distance], 1 - p)
        assert_independent(keep[:, distance:], keep[:, :-distance], 1 - p)
        assert_independent(keep[:, distance:, distance:], keep[:, :-distance, :-distance], 1 - p)
    for distance in (1, 2, 4):
        assert_independent(keep[distance:], keep[:-distance], 1 - p)


@of_both
def test_coordinates_are_not_interchangeable(of_attention: bool, device: str) -> None:
    """Row i, column j is drawn apart from row j, column i; so too with the plane."""
    keep = mask(5, 0.5, 16, 64, 64, device, of_attention)
    i, j = torch.triu_indices(64, 64, 1, device=device)
    assert_independent(keep[:, i, j], keep[:, j, i], 0.5)
    i, j = torch.triu_indices(16, 16, 1, device=device)
    assert_independent(keep[i, :, j], keep[j, :, i], 0.5)
    assert_independent(keep[i, j], keep[j, i], 0.5)


SEEDS = [(0, 1), (1, 2**32 + 1), (2**32, 2**33), (1, 2**62), (0, 2**63 - 2)]


@of_both
@pytest.mark.parametrize("seeds", SEEDS, ids=str)
def test_seeds_are_independent(seeds: tuple[int, int], of_attention: bool, device: str) -> None:
    """Also those that differ in their upper 32 bits alone."""
    a, b = (mask(seed, 0.5, 1, 64, 256, device, of_attention) for seed in seeds)
    assert_rate(a, 0.5)
    assert_independent(a, b, 0.5)


@of_both
def test_a_seed_gives_the_same_mask(of_attention: bool, device: str) -> None:
    first, again = (mask(3, 0.3, 2, 33, 65, device, of_attention) for _ in range(2))
    assert torch.equal(first, again)


@of_both
def test_lower_p_keeps_what_higher_p_keeps(of_attention: bool, device: str) -> None:
    """One draw, compared with p: a coupling that makes the rate exact in p."""
    few, many = (mask(3, p, 2, 33, 65, device, of_attention) for p in (0.7, 0.2))
    assert (many | ~few).all()


@of_both
@pytest.mark.parametrize(
    ("planes", "rows", "columns"), [(1, 1, 1), (2, 5, 3), (3, 40, 100), (1, 17, 4)], ids=str
)
def test_mask_does_not_depend_on_its_extent(
    planes: int, rows: int, columns: int, of_attention: bool, device: str
) -> None:
    whole = mask(11, 0.4, 3, 40, 200, device, of_attention)
    part = mask(11, 0.4, planes, rows, columns, device, of_attention)
    assert torch.equal(part, whole[:planes, :rows, :columns])


@of_both
def test_the_ends_of_p(of_attention: bool, device: str) -> None:
    assert mask(85, 0.0, 2, 30, 70, device, of_attention).all()  # one of its draws is 0
    assert not mask(1, 1.0, 2, 30, 70, device, of_attention).any()
    smallest = mask(1, 2.0**-24, 2, 30, 70, device, of_attention)
    assert smallest.float().mean() > 0.999


@of_both
def test_masks_stay_those_of_earlier_versions(of_attention: bool, device: str) -> None:
    drawn = mask(123456789012345, 0.1, 2, 48, 130, device, of_attention).to(torch.uint8).cpu()
    found = hashlib.sha1(drawn.numpy().tobytes()).hexdigest()[:12]
    assert found == ("37f3c68c8ef2" if of_attention else "1e0a590cc1f7")


@pytest.mark.parametrize("width", [64, 300, 5000])
def test_row_ops_apply_the_same_mask_whatever_their_tiles(width: int, device: str) -> None:
    """A narrow op and a wide one agree on the columns that they share."""
    ones = torch.ones(3, width, device=device)
    zeros = torch.zeros_like(ones)
    torch.manual_seed(21)
    seed = int(torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device))
    keep = mask(seed, 0.4, 1, 3, width, device)[0]
    torch.manual_seed(21)
    assert torch.equal(F.dropout_add(ones, zeros, p=0.4) != 0, keep)
    torch.manual_seed(21)
    assert torch.equal(F.bias_activation(ones, None, "relu", p=0.4) != 0, keep)
    torch.manual_seed(21)
    _, total = F.dropout_add_layer_norm(ones, zeros, (width,), p=0.4, return_sum=True)
    assert torch.equal(total != 0, keep)


def test_attention_applies_it_by_batch_and_head(device: str) -> None:
    """With values that are the identity the output shows the weights, dropped ones as 0."""
    q, k = torch.randn(2, 2, 3, 20, 16, device=device)
    value = torch.eye(20, device=device).expand(2, 3, 20, 20)
    torch.manual_seed(8)
    seed = int(torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device))
    torch.manual_seed(8)
    weights = F.scaled_dot_product_attention(q, k, value, dropout_p=0.3)
    keep = mask(seed, 0.3, 6, 20, 20, device, True).reshape(2, 3, 20, 20)
    assert torch.equal(weights != 0, keep)


def test_the_generator_decides(device: str) -> None:
    """The same manual_seed repeats a draw, and every call draws anew."""
    x = torch.ones(8, 64, device=device)
    zeros = torch.zeros_like(x)
    draws = []
    for _ in range(2):
        torch.manual_seed(2)
        draws.append([F.dropout_add(x, zeros, p=0.5) for _ in range(2)])
    (first, second), (first_again, second_again) = draws
    assert torch.equal(first, first_again)
    assert torch.equal(second, second_again)
    assert not torch.equal(first, second)


def test_without_dropout_the_generator_is_left_alone(device: str) -> None:
    x = torch.ones(8, 64, device=device)
    torch.manual_seed(2)
    before = torch.rand(3, device=device)
    torch.manual_seed(2)
    F.dropout_add(x, x, p=0.0)
    F.bias_activation(x, p=0.5, training=False)
    assert torch.equal(torch.rand(3, device=device), before)


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_ends_of_p_in_an_op(p: float, name: Literal["triton", "torch"], device: str) -> None:
    x, residual = torch.randn(2, 5, 40, device=device)
    x.requires_grad_()
    with backend(name):
        y = F.dropout_add(x, residual, p=p)
        (gradient,) = torch.autograd.grad(y, x, dy := torch.randn_like(y))
    assert torch.equal(y, residual + x if p == 0 else residual)
    assert torch.equal(gradient, dy if p == 0 else torch.zeros_like(dy))
