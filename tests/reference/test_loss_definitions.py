"""The definition of cross entropy against torch.nn.functional in float64, and by differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer import reference


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 7, 2, 4)], ids=str)
def test_equals_torch(
    shape: tuple[int, ...], weighted: bool, smoothing: float, reduction: str
) -> None:
    x = rand(*shape)
    classes = torch.randint(7, (*shape[:1], *shape[2:]) if len(shape) > 1 else ())
    if len(shape) > 1:
        classes.view(-1)[::3] = 5  # ignored
    distribution = torch.rand(shape, dtype=torch.float64)
    weight = torch.rand(7, dtype=torch.float64) if weighted else None
    for target in (classes, distribution):
        settings: dict[str, Any] = dict(reduction=reduction, label_smoothing=smoothing)
        if len(shape) > 1 and target is classes:
            settings["ignore_index"] = 5
        ours = reference.cross_entropy(x, target, weight, **settings)
        theirs = F.cross_entropy(x, target, weight, **settings)
        torch.testing.assert_close(ours, theirs)
        dy = torch.randn_like(ours)
        grads = [torch.autograd.grad(loss, x, dy)[0] for loss in (ours, theirs)]
        torch.testing.assert_close(*grads)


def test_no_row_that_counts() -> None:
    x, target = rand(3, 7), torch.full((3,), -100)
    assert reference.cross_entropy(x, target).isnan()
    assert reference.cross_entropy(x, target, reduction="sum") == 0


def test_gradients_by_differences() -> None:
    target = torch.tensor([[2, -100], [0, 3]])

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return reference.linear_cross_entropy(
            x, w, target, linear_bias=b, label_smoothing=0.1, reduction="none"
        )

    assert torch.autograd.gradcheck(loss, (rand(2, 2, 3), rand(4, 3), rand(4)))
