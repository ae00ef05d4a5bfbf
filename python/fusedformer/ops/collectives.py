"""Run collectives over the ranks of a process group, differentiable by autograd.

Autograd differentiates the sum of all ranks' results, so a rank's gradient includes the effects
of its tensor on every rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_equal_shapes(function: str, tensor: Tensor, group: Any) -> None:
    """Raise ``ValueError`` on every rank unless ``tensor`` has one shape on all of them.

    A compiler's trace skips it, since the answer takes values from the device.
    """
    if torch.compiler.is_compiling():
        return
    import torch.distributed as dist

    own = torch.tensor(tensor.shape, device=tensor.device)
    found = own.new_empty(group.size() * own.numel())
    dist.all_gather_into_tensor(found, own, group)
    shapes = [tuple(shape) for shape in found.view(group.size(), -1).tolist()]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"{function}(): expected all ranks of 'group' to have embeddings of one shape, but "
            f"got {', '.join(map(str, shapes))}"
        )


def all_gather(x: Tensor, group: Any) -> Tensor:
    """Concatenate the ranks' tensors along dimension 0."""
    found: Tensor = _AllGather.apply(x, group)  # type: ignore[no-untyped-call]
    return found


def all_to_all(x: Tensor, group: Any) -> Tensor:
    """Exchange pieces of dimension 0: piece r goes to rank r, which gets one of each rank."""
    found: Tensor = _AllToAll.apply(x, group)  # type: ignore[no-untyped-call]
    return found


def all_reduce(x: Tensor, group: Any) -> Tensor:
    """Add up the ranks' tensors."""
    found: Tensor = _AllReduce.apply(x, group)  # type: ignore[no-untyped-call]
    return found


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        import torch.distributed as dist

        ctx.group = group
        gathered = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous(), group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _ReduceScatter.apply(grad, ctx.group), None  # type: ignore[no-untyped-call]


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        import torch.distributed as dist

        ctx.group = group
        piece = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
        dist.reduce_scatter_tensor(piece, x.contiguous(), group=group)
        return piece

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _AllGather.apply(grad, ctx.group), None  # type: ignore[no-untyped-call]


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        import torch.distributed as dist

        ctx.group = group
        found = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(found, x.contiguous(), group=group)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _AllToAll.apply(grad, ctx.group), None  # type: ignore[no-untyped-call]


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        import torch.distributed as dist

        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _AllReduce.apply(grad, ctx.group), None  # type: ignore[no-untyped-call]
