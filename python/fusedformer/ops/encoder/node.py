"""A layer of an encoder or decoder as one node of autograd, on the kernels.

Step by step an encoder layer is six nodes, each of which is called, saves and returns by itself.
Here the forward and the backward are one function each, over the same launchers and products in the
same order, so with the same bits. What the backward reads is saved once, and the gradient that
comes by way of a residual is the memory that the product beside it adds to.

Who calls it has seen that the layer does nothing else: see ``nn.TransformerEncoderLayer``.

A decoder layer attends to a memory too. The memory is handed on from layer to layer, so that each
layer's product adds its part of the memory's gradient to what the layers behind it gave.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fusedformer._internal import checks
from fusedformer._internal.autocast import autocast_dtype, autocast_off, cast
from fusedformer._internal.backend import kernels_run_on
from fusedformer._internal.plans import saved_as_they_are
from fusedformer._internal.tracing import is_eager, may_be_batched
from fusedformer.ops._registered import plain_apply
from fusedformer.ops._shared import NO_DOUBLE_BACKWARD
from fusedformer.ops.attention.calls import MAX_HEAD_DIM
from fusedformer.ops.attention.terms import N_TENSORS, AttentionTerms
from fusedformer.ops.encoder.arguments import (
    OF_PRODUCTS,
    EncoderParameters,
    EncoderSettings,
    Kept,
    Needs,
)
from fusedformer.ops.encoder.backward import Backward
from fusedformer.ops.encoder.forward import Call, forward


def encoder_layer(
    x: Tensor,
    residual: Tensor | None,
    parameters: EncoderParameters,
    settings: EncoderSettings,
    terms: AttentionTerms,
    memory: Tensor | None = None,
    cross_terms: AttentionTerms | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """Compute a layer: (output, None), or with the last sum left open (its addend, the sum before).

    Third comes the memory, to be handed on to the next layer.

    None where weights have not the dtype of ``x``, and no autocast: products raise then.

    Args:
        x: ``[batch, length, E]``, or packed rows ``[total, E]``, contiguous: what attention reads.
        residual: of its shape, if it is not ``x`` itself: where norms come first.
        parameters, settings: of the layer.
        terms: what attention's scores depend on, but the seed; none of them requires a gradient.
        memory, cross_terms: of a decoder's layer, which attends to a memory like ``x`` too.

    Raises:
        RuntimeError: from the backward, if its own gradient is asked for.
    """
    dtype = norm_dtype = None
    is_autocast = torch._C._is_any_autocast_enabled()
    if is_autocast:
        dtype = autocast_dtype("linear", x)
        norm_dtype = autocast_dtype("layer_norm", x)
        if dtype is not None:
            read = {name: getattr(parameters, name) for name in OF_PRODUCTS}
            parameters = parameters._replace(**{name: cast(t, dtype) for name, t in read.items()})
    if dtype is None:
        for parameter in _of_products(parameters):
            if parameter is not None and parameter.dtype is not x.dtype:
                return None
    batch = x.shape[0] if x.dim() == 3 else 1
    call = Call(settings, terms, cross_terms, batch, norm_dtype)
    if torch.is_grad_enabled():
        given = x, residual, memory, *parameters
        for tensor in given:
            if tensor is not None and tensor.requires_grad:
                output, total, *same = _apply(*given, call)
                return output, total, same[0] if same else memory
    with autocast_off(x) if is_autocast else _NOTHING:
        (output, total, _), _ = run_forward(x, residual, memory, parameters, call, keeps=False)
    return output, total, memory


_NOTHING = contextlib.nullcontext()
_of_products = operator.itemgetter(*map(EncoderParameters._fields.index, OF_PRODUCTS))


def encoder_layer_is_one_node(x: Tensor, mask: Tensor | None, head_dim: int) -> bool:
    """Return whether :func:`encoder_layer` may compute a layer on ``x``, its scores by ``mask``.

    Tracers, modes and transforms want to see its steps; a mask that is learned gets its gradient
    from them; and rows of a batch must lie one after another.
    """
    return (
        (type(x) is Tensor or type(x) is Parameter)
        and kernels_run_on(x)
        and is_eager()
        and x.dtype in checks.KERNEL_DTYPES
        and x.is_contiguous()
        and x.numel() > 0
        and 1 <= head_dim <= MAX_HEAD_DIM
        and not (mask is not None and mask.requires_grad)
        and not torch._C._autograd._profiler_enabled()  # which names steps
    )


def run_forward(
    x: Tensor,
    residual: Tensor | None,
    memory: Tensor | None,
    own: EncoderParameters,
    call: Call,
    *,
    keeps: bool,
) -> tuple[tuple[Tensor, Tensor | None, Kept], Any]:
    """Return results in the shape of ``x``, what a backward would read, and the call's plan."""
    shape = x.shape
    rows = x.view(-1, shape[-1])
    residual_rows = None if residual is None else residual.reshape(-1, shape[-1])
    memory_rows = None if memory is None else memory.view(-1, shape[-1])
    args = rows, residual_rows, memory_rows, own, *call, keeps
    (output, total, kept), plan = _planner().run(args, {})
    if len(shape) == 3:
        output, total = output.view(shape), None if total is None else total.view(shape)
    return (output, total, kept), plan


@functools.cache
def _plans() -> Any:
    """Import the kernels' part when it is first needed."""
    from fusedformer_kernels.runtime import plans

    return plans


@functools.cache
def _planner() -> Any:
    """Return the planner of the forward."""
    return _plans().Planner(forward)


class _EncoderLayer(torch.autograd.Function):
    """Takes ``x``, ``residual``, ``memory``, the parameters; then the call."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, memory: Tensor | None, *rest: Any
    ) -> tuple[Tensor | None, ...]:
        own, call = EncoderParameters(*rest[:-1]), rest[-1]
        (output, total, kept), ctx.plan = run_forward(x, residual, memory, own, call, keeps=True)
        needs = Needs(*ctx.needs_input_grad[:-1])
        if not saved_as_they_are():
            ctx.plan = None
        if call.how.checkpoint_activation or not needs.weight2:
            kept = kept._replace(hidden=None)
        if not needs.weight1:
            kept = kept._replace(middle=None)
        if not (needs.in_weight or needs.key_weight or needs.value_weight):
            kept = kept._replace(source=None)
        saved = (*kept, *own, *call.terms[:N_TENSORS])
        call = call._replace(terms=call.terms[N_TENSORS:])
        if memory is not None:
            if not needs.cross_weight:
                saved = (*kept._replace(asking=None, memory=None), *saved[_KEPT:])
            saved = (*saved, *call.cross_terms[:N_TENSORS])
            call = call._replace(cross_terms=call.cross_terms[N_TENSORS:])
        ctx.save_for_backward(*saved)
        ctx.needs, ctx.call, ctx.shape = needs, call, x.shape
        ctx.memory_shape, ctx.is_apart = memory is not None and memory.shape, residual is not None
        ctx.set_materialize_grads(False)
        return (output, total, memory) if needs.memory else (output, total)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, sum_grad: Tensor | None, memory_grad: Tensor | None = None
    ) -> tuple[Any, ...]:
        needs, shape = ctx.needs, ctx.shape
        if grad is None and sum_grad is None:
            return None, None, memory_grad, *(None,) * (len(needs) - 2)
        if torch.is_grad_enabled():
            raise RuntimeError(NO_DOUBLE_BACKWARD.format("an encoder layer"))
        saved = ctx.saved_tensors
        if ctx.plan is None:  # what hooks have kept may have come back with other strides
            saved = tuple(None if t is None else t.contiguous() for t in saved)
        if grad is None:
            assert sum_grad is not None
            grad = torch.zeros_like(sum_grad)
        rows = grad.reshape(-1, shape[-1])
        if sum_grad is not None:
            sum_grad = sum_grad.reshape(-1, shape[-1])
        if memory_grad is not None:
            memory_grad = memory_grad.reshape(-1, shape[-1])

        def compute() -> tuple[Tensor | None, ...]:
            kept, own = Kept(*saved[:_KEPT]), EncoderParameters(*saved[_KEPT:_OWN])
            call = ctx.call._replace(terms=AttentionTerms(*saved[_OWN:_TERMS], *ctx.call.terms))
            if call.cross_terms is not None:
                call = call._replace(cross_terms=AttentionTerms(*saved[_TERMS:], *call.cross_terms))
            one = Backward(kept, own, call, needs, ctx.is_apart)
            return one.gradients(rows, sum_grad, memory_grad)

        kind = (
            needs,
            *[
                None if one is None else (one.dtype, one.stride())
                for one in (sum_grad, memory_grad)
            ],
        )
        with autocast_off(rows):  # the forward decided on the dtypes
            if may_be_batched():
                found = compute()
            else:
                others = (sum_grad, memory_grad, *saved)
                found = _plans().follow(ctx.plan, kind, rows, others, compute)
        x_grad, residual_grad, memory_grad, *parameter_grads = found
        if x_grad is not None:
            x_grad = x_grad.view(shape)
        if residual_grad is not None:
            residual_grad = residual_grad.view(shape)
        if memory_grad is not None:
            memory_grad = memory_grad.view(ctx.memory_shape)
        return x_grad, residual_grad, memory_grad, *parameter_grads, None


_KEPT = len(Kept._fields)
_OWN = _KEPT + len(EncoderParameters._fields)
_TERMS = _OWN + N_TENSORS
_apply = plain_apply(_EncoderLayer)
