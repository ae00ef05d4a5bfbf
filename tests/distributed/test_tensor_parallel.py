"""Heads and hidden features over ranks: training steps are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import RankError, Ranks
from steps import TINY, Case, Tensors, judge, step, unread
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module

import fusedformer
from fusedformer import backend
from fusedformer.distributed import tensor_parallel_plan

PLAIN = Case()
PRE = PLAIN._replace(norm_first=True)
DECODER = PLAIN._replace(stack="decoder")


def whole(tensor: Any) -> Tensor:
    """As torch has it: the three parts of a projection in one dimension."""
    full: Tensor = tensor.full_tensor()
    three = full.dim() > 1 and full.shape[0] == 3
    return full.flatten(0, 1) if three else full


def parallel(case: Case, mesh: DeviceMesh, sequence_parallel: bool, fused: bool = False) -> Any:
    model = case.model(nn if fused else fusedformer.nn)
    model.load_state_dict(case.weights())
    if fused:
        fusedformer.fuse(model)
    plan = tensor_parallel_plan(model, sequence_parallel=sequence_parallel)
    return parallelize_module(model, mesh, plan)


def trained(mesh: DeviceMesh, case: Case, name: Any, sequence_parallel: bool, fused: bool) -> Tensors:
    model = parallel(case, mesh, sequence_parallel, fused)
    with backend(name):
        return step(model, unread(case.batch()), whole=whole)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "rows too"])
@pytest.mark.parametrize(
    ("size", "case", "name", "fused"),
    [
        (4, PLAIN, "torch", False),
        (2, PRE, "torch", True),
        (2, TINY, "triton", False),
        (2, PLAIN._replace(padding=False), "torch", False),
        (2, DECODER, "torch", False),
        (4, DECODER._replace(norm_first=True), "torch", False),
    ],
    ids=["4 ranks", "pre, fused", "kernels", "whole", "decoder", "pre decoder"],
)
def test_a_step(
    ranks: Ranks, size: int, case: Case, name: Any, fused: bool, sequence_parallel: bool
) -> None:
    judge(
        case, lambda drawn: ranks.run(trained, drawn, name, sequence_parallel, fused, size=size)
    )
