"""Dropout of the torch backend: statistics, the factor, reproducibility, what goes to ATen."""

from __future__ import annotations

import math

import pytest
import torch

from fusedformer.ops.dropout_aten import (
    drop_again_in_place,
    drop_in_place,
    dropout_add_aten,
    dropout_aten,
    kept_factor,
)

SIGMAS = 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("p", [0.004, 0.1, 0.5, 0.9, 0.996])
def test_rate_and_mean(p: float, dtype: torch.dtype) -> None:
    """Over pieces, and in each of the four elements of a draw; the factor is torch's."""
    ones = torch.ones(400_003, dtype=dtype)
    output = dropout_aten(ones, p)
    kept = output != 0
    for part in (kept, kept[:131_072], kept[131_072:], *(kept[i::4] for i in range(4))):
        sigma = math.sqrt(p * (1 - p) / part.numel())
        assert abs(part.double().mean().item() - (1 - p)) <= SIGMAS * sigma
    (factor,) = output[kept].unique()
    assert factor.item() == pytest.approx(1 / (1 - p), rel=torch.finfo(dtype).eps)
    together = (kept[1:] & kept[:-1]).double().mean().item()  # neighbours are independent
    assert abs(together - (1 - p) ** 2) <= SIGMAS * math.sqrt((1 - p) ** 2 / kept.numel())


@pytest.mark.parametrize("p", [0.0, 1e-4, 0.3, 1.0])
def test_in_place_and_again(p: float) -> None:
    """What was dropped is dropped again; at 0 nothing, at 1 all, and next to 0 as ATen."""
    x = torch.rand(300, 700) + 1
    dropped = x.clone()
    kept = drop_in_place(dropped, p)
    if kept is None:
        assert p == 0 and torch.equal(dropped, x)
        return
    assert torch.equal(dropped != 0, kept)
    again = x.clone()
    drop_again_in_place(again, kept, p)
    assert torch.equal(again, dropped)
    assert torch.allclose(x * kept_factor(kept, p, x), dropped)


def test_the_seed_decides() -> None:
    x, residual = torch.rand(1000), torch.rand(1000)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(dropout_aten(x, 0.5))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    torch.manual_seed(1)
    assert torch.allclose(dropout_add_aten(x, residual, 0.5), found[0] + residual)
    for p, whole in ((0.0, x), (1.0, torch.zeros_like(x))):
        assert torch.equal(dropout_aten(x, p), whole)
        assert torch.equal(dropout_add_aten(x, residual, p), whole + residual)


def test_gradients_and_odd_shapes() -> None:
    for shape in ((), (1,), (0, 3), (5, 7, 3)):
        x = torch.rand(shape, requires_grad=True)
        output = dropout_aten(x, 0.5)
        dy = torch.rand(shape)
        (grad,) = torch.autograd.grad(output, x, dy)
        assert output.shape == shape and torch.equal(grad, torch.where(output == 0, 0.0, 2 * dy))
