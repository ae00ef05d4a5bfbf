"""Contrastive losses of a batch that ranks share: those of one process with all of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.distributed.ranks import Ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from fusedformer import backend, nn, reference
from fusedformer import functional as F
from fusedformer.testing import compare_tensors

NAMES = ["contrastive_loss", "sigmoid_contrastive_loss"]
ROWS, DIMS = 24, 16
Tensors = dict[str, Tensor]


def batch(name: str) -> Tensors:
    """Of all ranks together."""
    generator = torch.Generator().manual_seed(3)
    a, b = torch.nn.functional.normalize(torch.randn(2, ROWS, DIMS, generator=generator), dim=-1)
    given = {"a": a, "b": b, "logit_scale": torch.tensor(9.0)}
    if name == "sigmoid_contrastive_loss":
        given["logit_bias"] = torch.tensor(-2.0)
    return given


def results(function: Any, given: Tensors, **settings: Any) -> Tensors:
    """Losses, and gradients of the sum of losses that are weighted by their rows."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in given.items() if k != "weights"}
    losses = function(**leaves, **settings)
    weights = given["weights"] if losses.dim() else torch.tensor(1.5, dtype=losses.dtype)
    grads = torch.autograd.grad(losses, list(leaves.values()), weights.to(losses.dtype))
    return {"losses": losses.detach(), **dict(zip(leaves, grads, strict=True))}


def of_a_rank(mesh: DeviceMesh, name: str, which: Any, reduction: str, given: Tensors) -> Tensors:
    rank, size = mesh.get_local_rank(), mesh.size()
    own = {k: v.chunk(size)[rank] if v.dim() else v for k, v in given.items()}
    with backend(which):
        return results(getattr(F, name), own, reduction=reduction, group=mesh.get_group())


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("which", ["torch", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_ranks_compute_the_whole_batch(
    ranks: Ranks, name: str, reduction: str, which: str, size: int
) -> None:
    given = {**batch(name), "weights": torch.rand(ROWS)}
    found = ranks.run(of_a_rank, name, which, reduction, given, size=size)
    wide = {k: v.double() for k, v in given.items()}
    truth = results(getattr(reference, name), wide, reduction=reduction)
    with backend("torch"):
        stock = results(getattr(F, name), given, reduction=reduction)
    together = {}
    for key in truth:
        pieces = torch.stack([each[key] for each in found])
        if key == "losses" and reduction != "none":
            assert (pieces == pieces[0]).all()
            together[key] = pieces[0]
        elif key in ("a", "b", "losses"):
            together[key] = pieces.flatten(0, 1)
        else:
            together[key] = pieces.sum(0)
    if reduction != "none":  # each rank has the loss, and its gradient is that of all of them
        together |= {k: v / size for k, v in together.items() if k != "losses"}
    faults = [compare_tensors(k, together[k], stock[k], truth[k]).fault for k in truth]
    assert not any(faults), faults


class Towers(torch.nn.Module):
    """Two encoders and a loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.images, self.texts = torch.nn.Linear(6, DIMS), torch.nn.Linear(6, DIMS)
        self.loss = nn.ContrastiveLoss(math.log(5.0))

    def forward(self, images: Tensor, texts: Tensor, group: Any = None) -> Tensor:
        a, b = self.images(images), self.texts(texts)
        normalize = torch.nn.functional.normalize
        loss: Tensor = self.loss(normalize(a, dim=-1), normalize(b, dim=-1), group=group)
        return loss


def gradients(model: torch.nn.Module, *inputs: Any) -> Tensors:
    model(*inputs).backward()
    return {
        n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None
    }


def trained(mesh: DeviceMesh, inputs: Tensor) -> Tensors:
    ddp = DistributedDataParallel(Towers(), process_group=mesh.get_group())
    own = inputs.chunk(mesh.size(), 1)[mesh.get_local_rank()]
    with backend("torch"):
        return gradients(ddp, *own, mesh.get_group())


def test_ddp_trains_as_one_process_does(ranks: Ranks) -> None:
    inputs = torch.randn(2, 8, 6)
    found = ranks.run(trained, inputs)
    with backend("torch"):
        stock = gradients(Towers(), *inputs)
        truth = gradients(Towers().double(), *inputs.double())
    assert set(stock) == set(dict(Towers().named_parameters()))
    for each in found:
        faults = [compare_tensors(k, each[k], stock[k], truth[k]).fault for k in truth]
        assert not any(faults), faults


def unequal(mesh: DeviceMesh) -> str:
    x = torch.randn(3 + mesh.get_local_rank(), 4)
    with pytest.raises(ValueError, match="embeddings of one shape") as raised:
        F.contrastive_loss(x, x, 1.0, group=mesh.get_group())
    return str(raised.value)


def test_unequal_pieces_are_an_error_on_every_rank(ranks: Ranks) -> None:
    messages = ranks.run(unequal, size=2)
    assert all("(3, 4), (4, 4)" in message for message in messages)


def misused(mesh: DeviceMesh) -> None:
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"as many rows where 'group' is given.* 3 and 4"):
        F.contrastive_loss(x, torch.randn(4, 4), 1.0, group=mesh.get_group())


def test_more_columns_are_an_error(ranks: Ranks) -> None:
    ranks.run(misused, size=2)
