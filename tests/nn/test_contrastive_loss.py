"""The contrastive losses as modules."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from fusedformer import functional as F
from fusedformer import nn

CLASSES = [nn.ContrastiveLoss, nn.SigmoidContrastiveLoss]


def embeddings(rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.nn.functional.normalize(torch.randn(2, rows, 8), dim=-1)
    return a, b


def test_they_start_as_clip_and_siglip_do() -> None:
    clip, siglip = nn.ContrastiveLoss(), nn.SigmoidContrastiveLoss()
    assert math.isclose(clip.factor().item(), 1 / 0.07, rel_tol=1e-6)
    assert math.isclose(siglip.factor().item(), 10.0, rel_tol=1e-6)
    assert siglip.logit_bias.item() == -10.0
    assert set(clip.state_dict()) == {"logit_scale"}
    assert set(siglip.state_dict()) == {"logit_scale", "logit_bias"}
    assert all(p.shape == () for p in [*clip.parameters(), *siglip.parameters()])


@pytest.mark.parametrize("cls", CLASSES)
def test_the_loss_is_the_functional_one_and_all_is_learned(cls: Any) -> None:
    module, (a, b) = cls(reduction="none"), embeddings()
    found = module(a[:4], b, label_offset=2)
    more = (module.logit_bias,) if cls is nn.SigmoidContrastiveLoss else ()
    function = F.sigmoid_contrastive_loss if more else F.contrastive_loss
    scale = module.logit_scale.exp()
    assert torch.equal(found, function(a[:4], b, scale, *more, label_offset=2, reduction="none"))
    found.sum().backward()
    assert all(p.grad is not None and p.grad != 0 for p in module.parameters())


def test_the_scale_is_kept_below_its_bound_and_can_come_back() -> None:
    module, (a, b) = nn.ContrastiveLoss(init_logit_scale=5.0), embeddings()
    assert math.isclose(module.eval().factor().item(), 100.0, rel_tol=1e-5)
    assert module.logit_scale.item() == 5.0  # only training changes it
    module.train()(a, b).backward()
    assert module.logit_scale.item() == pytest.approx(math.log(100))
    assert module.logit_scale.grad != 0
    unbounded = nn.ContrastiveLoss(5.0, None)
    unbounded(a, b)
    assert unbounded.logit_scale.item() == 5.0


@pytest.mark.parametrize("cls", CLASSES)
def test_copies_dtypes_and_repr(cls: Any) -> None:
    module = cls(1.5, dtype=torch.float64)
    assert all(p.dtype == torch.float64 for p in module.parameters())
    assert copy.deepcopy(module).logit_scale.item() == 1.5
    assert "init_logit_scale=1.5" in repr(module)
    with torch.no_grad():
        module.logit_scale.zero_()
    module.reset_parameters()
    assert module.logit_scale.item() == 1.5


@pytest.mark.parametrize("cls", CLASSES)
def test_bad_settings(cls: Any) -> None:
    with pytest.raises(TypeError, match="'init_logit_scale' to be a number"):
        cls("1")
    with pytest.raises(TypeError, match="'max_logit_scale' to be a number"):
        cls(max_logit_scale="1")
    with pytest.raises(ValueError, match="'reduction' to be one of"):
        cls(reduction="max")
