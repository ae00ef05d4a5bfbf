"""What starts processes for the other tests: results, errors, deaths and waits."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed.ranks import RankError, Ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fusedformer import backend
from fusedformer import functional as F


def summed(mesh: DeviceMesh, x: Tensor) -> Tensor:
    total = x + mesh.get_local_rank()
    dist.all_reduce(total, group=mesh.get_group())
    return total


def normed(mesh: DeviceMesh, x: Tensor, name: Any) -> Tensor:
    with backend(name):
        return F.layer_norm(x * (1 + mesh.get_local_rank()), x.shape[-1:])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_answers(ranks: Ranks, size: int) -> None:
    x = torch.randn(3)
    want = size * x + size * (size - 1) / 2
    assert all(torch.allclose(y, want) for y in ranks.run(summed, x, size=size))


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_both_backends_run(ranks: Ranks, name: Any) -> None:
    x = torch.randn(2, 8)
    want = torch.nn.functional.layer_norm(x, (8,))
    assert all(torch.allclose(y, want, atol=1e-4) for y in ranks.run(normed, x, name))


def fails_on_one(mesh: DeviceMesh, rank: int, how: str) -> int:
    if mesh.get_local_rank() == rank:
        if how == "raises":
            raise KeyError("what it raised")
        if how == "dies":
            os._exit(3)
        time.sleep(60)
    return rank


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "rank 1: .*fails_on_one.*KeyError: 'what it raised'"),
        ("dies", "rank 1: died with exit code 3"),
        ("hangs", "rank 1: did not answer in time"),
    ],
)
def test_a_rank_that_fails_is_an_error_and_not_the_end(
    ranks: Ranks, how: str, message: str
) -> None:
    seconds = 0.5 if how == "hangs" else 30.0
    ranks.run(summed, torch.ones(1))  # started before the wait
    with pytest.raises(RankError, match=f"(?s){message}") as raised:
        ranks.run(fails_on_one, 1, how, size=2, seconds=seconds)
    assert set(raised.value.errors) == {1}
    assert ranks.run(summed, torch.ones(1))[3] == 10
