"""Collectives between tensors that every rank has whole and tensors of which it has a part.

Column-wise and row-wise products need no communication of their own. Around them there is some: the
gradient of a column-wise product's input, and the output of a row-wise product, are sums over
ranks. If rows (tokens) are spread over ranks between the products, sums are scattered and parts are
gathered instead, which moves the same amount of data.

Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053; rows: Korthikanti et al., Reducing
Activation Recomputation in Large Transformer Models, arXiv:2205.05198.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate

from fusedformer._internal.backend import chosen_backend
from fusedformer.functional.steps import seeds_added_to
from fusedformer.nn import MultiheadAttention


class Region:
    """A group of ranks that share layers.

    Attributes:
        group: of ``size`` ranks, this one is ``rank``.
        sequence_parallel: whether rows are spread over the ranks where they can be.
        total: the number of rows while they are, else None: every rank has all.
    """

    def __init__(self, mesh: DeviceMesh, sequence_parallel: bool) -> None:
        self.group = mesh.get_group()
        self.size, self.rank = mesh.size(), mesh.get_local_rank()
        self.sequence_parallel = sequence_parallel
        self.total: int | None = None
        self._is_own = False

    def enter(self, x: Tensor) -> Tensor:
        """Gather all rows before a column-wise product."""
        if self.total is None:
            return self.share(x)
        return _apply(_Gather, x, self.group)[: self.total]

    def leave(self, x: Tensor) -> Tensor:
        """Sum over ranks after a row-wise product: all rows, or this rank's rows."""
        if self.total is None:
            return _apply(_Sum, x, self.group)
        return _apply(_ScatterSum, self._padded(x), self.group)

    def share(self, x: Tensor) -> Tensor:
        """Return ``x``, which every rank has whole; its gradient is summed over the ranks."""
        return _apply(_SumGradient, x, self.group)

    @contextlib.contextmanager
    def spread(self, x: Tensor, training: bool) -> Iterator[None]:
        """Spread the rows of ``x`` over the ranks between the products, while inside."""
        self.total = x.shape[0]
        try:
            with self.own_dropout(x, float(training)):
                yield
        finally:
            self.total = None

    def split(self, x: Tensor) -> Tensor:
        """Return this rank's rows, padded with zeros to the same number on all ranks."""
        return _apply(_Split, self._padded(x), self.group)

    def join(self, x: Tensor) -> Tensor:
        """Gather the rows of all ranks: the inverse of :meth:`split`."""
        return _apply(_Join, x, self.group)[: self.total]

    @contextlib.contextmanager
    def own_dropout(self, x: Tensor, p: float) -> Iterator[None]:
        """Let every rank drop other elements with probability ``p``, while inside.

        Before and after, all ranks draw the same random numbers.
        """
        if not p or self._is_own:
            yield
            return
        self._is_own = True
        try:
            if chosen_backend(x) == "triton":
                with seeds_added_to(self.rank):
                    yield
            else:
                with _reseeded(x.device, self.rank):
                    yield
        finally:
            self._is_own = False

    def _padded(self, x: Tensor) -> Tensor:
        missing = -x.shape[0] % self.size
        return F.pad(x, (0, 0, 0, missing)) if missing else x

    @contextlib.contextmanager
    def local(self, *modules: nn.Module | None) -> Iterator[None]:
        """Make the parameters of ``modules`` plain tensors, this rank's parts, while inside.

        Attention then has only the heads of its part. Outside, the parameters are DTensors.
        """
        places: list[tuple[nn.Module, str, Any]] = [
            (module, name, parameter)
            for outer in modules if outer is not None
            for module in outer.modules()
            for name, parameter in module._parameters.items() if parameter is not None
        ]  # fmt: skip
        replicated = [p for _, _, p in places if p.placements == (Replicate(),)]
        parts = {p: p.to_local() for _, _, p in places}
        if self.total is not None and replicated:
            own = [parts[p] for p in replicated]
            parts |= dict(zip(replicated, _SumGradients.apply(self.group, *own), strict=True))  # type: ignore[no-untyped-call]
        attentions = {m: m.num_heads for m, _, _ in places if isinstance(m, MultiheadAttention)}
        try:
            for module, name, parameter in places:
                part = parts[parameter]
                if name.startswith("in_proj"):
                    part = part.flatten(0, 1)
                module._parameters[name] = part
            for attention in attentions:
                attention.num_heads //= self.size
            yield
        finally:
            for module, name, parameter in places:
                module._parameters[name] = parameter
            for attention, heads in attentions.items():
                attention.num_heads = heads


@contextlib.contextmanager
def _reseeded(device: torch.device, rank: int) -> Iterator[None]:
    """Reseed torch's generator of ``device`` from its state and ``rank``, while inside."""
    generator = torch.default_generator
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index]
    # Move the generator on, so that the next call reseeds otherwise.
    torch.empty(1, device=device).uniform_(generator=generator)
    state = generator.get_state()
    generator.manual_seed(zlib.crc32(state.numpy().tobytes() + rank.to_bytes(4, "little")))
    try:
        yield
    finally:
        generator.set_state(state)


def _apply(function: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
    result: Tensor = function.apply(x, group)
    return result


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    whole = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole


def _scattered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    part = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(part, x.contiguous(), group=group)
    return part


def _part(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x.chunk(group.size())[group.rank()].clone()


def _autograd_function(name: str, forwards: Any, backwards: Any) -> Any:
    """Make an autograd function from a collective for each direction."""

    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        result: Tensor = forwards(x, group)
        return result

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return backwards(grad, ctx.group), None

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), members)


def _same(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x.view_as(x)


_SumGradient = _autograd_function("_SumGradient", _same, _summed)
_Sum = _autograd_function("_Sum", _summed, _same)
_Gather = _autograd_function("_Gather", _gathered, _scattered)
_ScatterSum = _autograd_function("_ScatterSum", _scattered, _gathered)
_Split = _autograd_function("_Split", _part, _gathered)
_Join = _autograd_function("_Join", _gathered, _part)


class _SumGradients(torch.autograd.Function):
    """Identity; the gradients are summed over the ranks in one collective."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        flat = _summed(torch.cat([grad.flatten() for grad in grads]), ctx.group)
        parts = torch.split(flat, [grad.numel() for grad in grads])
        return None, *(part.view_as(grad) for part, grad in zip(parts, grads, strict=True))
