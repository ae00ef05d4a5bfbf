"""Optimizer steps side by side."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedformer
from fusedformer import backend, parity


@pytest.fixture(autouse=True)
def _torch_backend() -> Any:
    with backend("torch"):
        yield


def _stack(p: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, p, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = (model(batch) - batch.roll(1, 1)).square().mean()
    return loss


BATCHES = list(torch.randn(10, 4, 6, 16, generator=torch.Generator().manual_seed(1)))


def test_a_fused_model_trains_beside_stock(tmp_path: Path) -> None:
    stock = _stack()
    fused = copy.deepcopy(stock)
    fusedformer.fuse(fused)
    state = copy.deepcopy(stock.state_dict())
    report = parity.training(fused, stock, BATCHES, loss=_loss)
    assert report.passed, str(report)
    assert report.losses["baseline"][-1] < report.losses["baseline"][0]
    assert set(report.weight_gaps) == {"candidate", "nudged 1", "nudged 2"}
    assert 0 < max(report.gradient_gaps["nudged 1"]) < 1e-3
    assert all(torch.equal(t, state[n]) for n, t in stock.state_dict().items())
    assert "PASS: 10 steps" in str(report)
    report.save(tmp_path / "training.json")
    assert json.loads((tmp_path / "training.json").read_text())["passed"] is True
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "training.svg")
    assert "<svg" in (tmp_path / "training.svg").read_text()


def test_a_model_that_trains_otherwise_fails() -> None:
    stock = _stack()
    wrong = copy.deepcopy(stock)
    wrong.get_submodule("layers.0.norm2").eps = 1e-3  # type: ignore[assignment]
    report = parity.training(wrong, stock, BATCHES, loss=_loss)
    assert not report.passed and "FAILED losses after step" in str(report)


def test_bad_calls_say_what_is_wrong() -> None:
    stock = _stack()
    with pytest.raises(TypeError, match="'baseline' to be a Module, but got function"):
        parity.training(stock, _loss, BATCHES)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one batch"):
        parity.training(stock, stock, [], loss=_loss)
    with pytest.raises(ValueError, match="'nudges' to be positive"):
        parity.training(stock, stock, BATCHES, loss=_loss, nudges=0)
    dropped = _stack(0.5)
    with pytest.raises(ValueError, match="draws random numbers"):
        parity.training(dropped, copy.deepcopy(dropped), BATCHES, loss=_loss)
