"""DistributedDataParallel: gradients are those of the whole batch in one process."""

from __future__ import annotations

from typing import Any

import pytest
from tests.distributed.ranks import Ranks
from tests.distributed.steps import TINY, Case, Tensors, joined, judge, part, step, unread
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

import fusedformer
from fusedformer import backend

PLAIN = Case()


def trained(mesh: DeviceMesh, case: Case, name: Any, how: str, settings: Any) -> Tensors:
    """A step of one rank on its part of the batch."""
    model = case.model(nn if how == "fuse" else fusedformer.nn)
    model.load_state_dict(case.weights())
    if how == "fuse":
        assert fusedformer.fuse(model)
    size = mesh.size()
    ddp = DistributedDataParallel(model, process_group=mesh.get_group(), **settings)
    own = part(unread(case.batch()), mesh.get_local_rank(), size)
    with backend(name):
        if how != "no_sync":
            return step(ddp, own, times=size)
        first, second = (part(own, i, 2) for i in range(2))
        with ddp.no_sync():
            early = step(ddp, first, times=size, update=False)
        return joined([early, step(ddp, second, times=size)])[1]


@pytest.mark.parametrize(
    ("size", "case", "name", "how", "settings"),
    [
        (4, PLAIN, "torch", "", {}),
        (2, TINY, "triton", "", {}),
        (2, PLAIN._replace(norm_first=True), "torch", "fuse", {}),
        (2, PLAIN._replace(padding=False), "torch", "no_sync", {}),
        (2, PLAIN._replace(norm_first=True), "torch", "", {"static_graph": True}),
        (2, PLAIN._replace(stack="decoder"), "torch", "", {"gradient_as_bucket_view": True}),
    ],
    ids=["4 ranks", "kernels", "fused", "no_sync", "static graph", "decoder"],
)
def test_a_step(ranks: Ranks, size: int, case: Case, name: Any, how: str, settings: Any) -> None:
    judge(case, lambda drawn: joined(ranks.run(trained, drawn, name, how, settings, size=size)))
