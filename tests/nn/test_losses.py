"""The loss modules: torch's results, names and state."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fusedformer
from fusedformer import nn


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_loss_takes_all_of_its_settings(smoothing: float, device: str) -> None:
    settings: dict[str, Any] = dict(
        weight=torch.rand(5), ignore_index=2, reduction="sum", label_smoothing=smoothing
    )
    x, target = torch.randn(2, 5, 3, device=device), torch.randint(5, (2, 3), device=device)
    stock = torch.nn.CrossEntropyLoss(**settings).to(device)
    want = stock(x, target)
    torch.testing.assert_close(nn.CrossEntropyLoss(**settings).to(device)(x, target), want)
    fusedformer.fuse(stock, strict=True)
    assert type(stock) is nn.CrossEntropyLoss
    torch.testing.assert_close(stock(x, target), want)


def test_linear_cross_entropy_loss_holds_the_projection(device: str) -> None:
    settings: dict[str, Any] = dict(
        bias=True, weight=torch.rand(9), ignore_index=2, label_smoothing=0.1, reduction="none"
    )
    module = nn.LinearCrossEntropyLoss(4, 9, **settings).to(device)
    assert set(module.state_dict()) == {"weight", "linear.weight", "linear.bias"}
    x, target = torch.randn(6, 4, device=device), torch.randint(9, (6,), device=device)
    want = torch.nn.CrossEntropyLoss(
        settings["weight"].to(device), ignore_index=2, label_smoothing=0.1, reduction="none"
    )(module.linear(x), target)
    torch.testing.assert_close(module(x, target), want)
    with pytest.raises(ValueError, match=r"'out_features' to be \(\), but got \(2,\)"):
        nn.LinearCrossEntropyLoss(4, 9, out_features=(2,))
    if hasattr(torch.nn, "LinearCrossEntropyLoss"):
        torch.manual_seed(3)
        theirs = torch.nn.LinearCrossEntropyLoss(4, 9, **settings)
        torch.manual_seed(3)
        again = nn.LinearCrossEntropyLoss(4, 9, **settings)
        again.load_state_dict(theirs.state_dict())
        assert torch.equal(again.linear.weight, theirs.linear.weight)
        torch.testing.assert_close(again.to(device)(x, target), theirs.to(device)(x, target))
