"""A rank that dies or comes with another shape is an error on the others, within the limit."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from tests.distributed.ranks import RankError, Ranks
from tests.distributed.steps import Case
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fusedformer import backend
from fusedformer.distributed import tensor_parallel_plan

CASE = Case(layers=1)


def wrapped(mesh: DeviceMesh, how: str, case: Case = CASE) -> Any:
    model: Any = case.model()
    if how == "DDP":
        return DistributedDataParallel(model, process_group=mesh.get_group())
    if how == "FSDP":
        return fully_shard(model, mesh=mesh)
    return parallelize_module(model, mesh, tensor_parallel_plan(model, sequence_parallel=True))


def dies(mesh: DeviceMesh, how: str) -> None:
    model = wrapped(mesh, how)
    with backend("torch"):
        output = model(torch.randn(2, 5, 16))
        if mesh.get_local_rank() == 1:
            os._exit(3)
        output.sum().backward()
        output = model(torch.randn(2, 5, 16))


def differs(mesh: DeviceMesh, how: str) -> None:
    rank = mesh.get_local_rank()
    if how != "tensor parallel":  # whose ranks share weights: there it is the batch
        wrapped(mesh, how, CASE._replace(layers=1 + rank))(torch.randn(2, 5, 16)).sum().backward()
        return
    with backend("torch"):
        wrapped(mesh, how)(torch.randn(2, 5 + rank, 16)).sum().backward()


@pytest.mark.parametrize("how", ["DDP", "FSDP", "tensor parallel"])
@pytest.mark.parametrize("function", [dies, differs])
def test_it_is_an_error_and_no_hang(ranks: Ranks, function: Any, how: str) -> None:
    with pytest.raises(RankError) as raised:
        ranks.run(function, how, size=2, seconds=40, group_seconds=5)
    errors = raised.value.errors
    assert set(errors) == {0, 1}
    assert not any("did not answer" in error for error in errors.values()), errors
    assert function is not dies or errors[1] == "died with exit code 3"
