"""An encoder layer as one node of autograd, on the kernels.

Step by step a layer is six nodes, each of which is called, saves and returns by itself. Here the
forward and the backward are one function each, over the same launchers and products in the same
order, so with the same bits. What the backward reads is saved once, and the gradient that comes by
way of a residual is the memory that the product beside it adds to.

Who calls it has seen that the layer does nothing else: see ``nn.TransformerEncoderLayer``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedformer._internal import checks
from fusedformer._internal.autocast import autocast_dtype, autocast_off, cast
from fusedformer._internal.backend import kernels_run_on
from fusedformer._internal.plans import saved_as_they_are, step
from fusedformer._internal.tracing import is_eager, is_traced, may_be_batched
from fusedformer.ops._registered import plain_apply
from fusedformer.ops._shared import NO_DOUBLE_BACKWARD, common_dtype, draw_seed
from fusedformer.ops.attention.calls import MAX_HEAD_DIM
from fusedformer.ops.attention.terms import N_TENSORS, AttentionTerms
from fusedformer.ops.product import product, product_add


class EncoderParameters(NamedTuple):
    """The parameters of a layer, but those of a norm before attention."""

    in_weight: Tensor  # [3E, E], of query, key and value; or [E, E] of the query alone
    in_bias: Tensor | None
    key_weight: Tensor | None  # None where ``in_weight`` is that of all three
    key_bias: Tensor | None
    value_weight: Tensor | None
    value_bias: Tensor | None
    out_weight: Tensor  # [E, E]
    out_bias: Tensor | None
    middle_weight: Tensor | None  # [E], of the norm between attention and feed-forward block
    middle_bias: Tensor | None
    weight1: Tensor  # [F, E]
    bias1: Tensor | None
    weight2: Tensor  # [E, F]
    bias2: Tensor | None
    last_weight: Tensor | None  # [E], of the norm at the end
    last_bias: Tensor | None


class EncoderSettings(NamedTuple):
    """What a layer computes with them; probabilities of dropout are 0 where it does not train."""

    heads: int
    activation: str  # a name that ``bias_activation`` knows
    middle_eps: float
    last_eps: float | None  # None: the last sum is left to the norm of the next layer
    hidden_p: float  # behind the activation
    middle_p: float  # of what attention adds
    last_p: float  # of what the feed-forward block adds
    checkpoint_activation: bool


def encoder_layer(
    x: Tensor,
    residual: Tensor | None,
    parameters: EncoderParameters,
    settings: EncoderSettings,
    terms: AttentionTerms,
) -> tuple[Tensor, Tensor | None]:
    """(output, None), or if the last sum is left open (what is to be added, first sum).

    Args:
        x: ``[batch, length, E]``, or packed rows ``[total, E]``, contiguous: what attention reads.
        residual: of its shape, if it is not ``x`` itself: where norms come first.
        parameters, settings: of the layer.
        terms: what attention's scores depend on, but the seed; none of them requires a gradient.

    Raises:
        RuntimeError: from the backward, if its own gradient is asked for.
    """
    dtype = autocast_dtype("linear", x)
    if dtype is not None:
        parameters = parameters._replace(
            **{name: cast(getattr(parameters, name), dtype) for name in _OF_PRODUCTS}
        )
    norm_dtype = autocast_dtype("layer_norm", x)
    given = x, residual, *parameters
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        found: tuple[Tensor, Tensor | None] = _apply(*given, settings, terms, norm_dtype)
        return found
    with autocast_off(x):
        results, _ = _run(x, residual, parameters, settings, terms, norm_dtype, keeps=False)
    return results[0], results[1]


# Parameters that products read; the kernels take the others as they are.
_OF_PRODUCTS = (*EncoderParameters._fields[:7], "weight1", "weight2")


def encoder_layer_is_one_node(x: Tensor, mask: Tensor | None, head_dim: int) -> bool:
    """Whether :func:`encoder_layer` may compute a layer on ``x``, with ``mask`` for its scores.

    Tracers, modes and transforms want to see its steps; a mask that is learned gets its gradient
    from them; and rows of a batch must lie one after another.
    """
    return (
        type(x) is Tensor
        and kernels_run_on(x)
        and not is_traced()
        and is_eager()
        and x.dtype in checks.KERNEL_DTYPES
        and x.is_contiguous()
        and x.numel() > 0
        and 1 <= head_dim <= MAX_HEAD_DIM
        and not (mask is not None and mask.requires_grad)
        and not torch._C._autograd._profiler_enabled()  # which names steps
    )


class _Kept(NamedTuple):
    """What a backward reads of what the forward has computed."""

    source: Tensor | None  # of attention, in the dtype of its product
    projected: Tensor  # query, key and value, or the query
    key: Tensor | None
    value: Tensor | None
    merged: Tensor
    statistics: Tensor
    sum1: Tensor | None
    mean1: Tensor | None
    rstd1: Tensor | None
    middle: Tensor | None  # of the feed-forward block
    before: Tensor  # its activation
    hidden: Tensor | None  # behind it
    sum2: Tensor | None
    mean2: Tensor | None
    rstd2: Tensor | None
    seed: Tensor | None  # of attention
    seed1: Tensor | None
    hidden_seed: Tensor | None
    seed2: Tensor | None


class _Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    residual: bool
    in_weight: bool
    in_bias: bool
    key_weight: bool
    key_bias: bool
    value_weight: bool
    value_bias: bool
    out_weight: bool
    out_bias: bool
    middle_weight: bool
    middle_bias: bool
    weight1: bool
    bias1: bool
    weight2: bool
    bias2: bool
    last_weight: bool
    last_bias: bool


# What is no launch. The products are torch's.
_seed, _product = step(draw_seed), step(product)


@step
def _add_product(x: Tensor, weight: Tensor, addend: Tensor | None) -> Tensor:
    if may_be_batched():  # nothing of many may be written in place
        return x @ weight if addend is None else addend + x @ weight
    return product_add(x, weight, addend)


@step
def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


@step
def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return grad.t() @ x


@step
def _bias_gradient(grad: Tensor) -> Tensor:
    return grad.sum(0)


def _in(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x if x.dtype == dtype else _cast(x, dtype)


def _run(
    x: Tensor,
    residual: Tensor | None,
    own: EncoderParameters,
    how: EncoderSettings,
    terms: AttentionTerms,
    norm_dtype: torch.dtype | None,
    *,
    keeps: bool,
) -> tuple[tuple[Tensor, Tensor | None, _Kept], Any]:
    """Results in the shape of ``x``, what a backward would read, and the plan of the call."""
    shape = x.shape
    rows = x.view(-1, shape[-1])
    residual_rows = None if residual is None else residual.view(-1, shape[-1])
    batch = shape[0] if len(shape) == 3 else 1
    args = rows, residual_rows, own, how, terms, batch, norm_dtype, keeps
    (output, total, kept), plan = _launchers().forward.run(args, {})
    if len(shape) == 3:
        output, total = output.view(shape), None if total is None else total.view(shape)
    return (output, total, kept), plan


def _forward(
    x: Tensor,
    residual: Tensor | None,
    own: EncoderParameters,
    how: EncoderSettings,
    terms: AttentionTerms,
    batch: int,
    norm_dtype: torch.dtype | None,
    keeps: bool,
) -> tuple[Tensor, Tensor | None, _Kept | None]:
    """The two results of rows ``[total, E]``, and what a backward would read if it ``keeps`` it."""
    run, device, opened = _launchers(), x.device, how.last_eps is None
    source = _in(own.in_weight.dtype, x)
    seed = _seed(terms.p, device)
    projected = tuple(_product(source, weight, bias) for weight, bias in _projections(own))
    merged, statistics = run.attention(projected, batch, how.heads, terms._replace(seed=seed))
    inner = _product(merged, own.out_weight, None)
    seed1 = _seed(how.middle_p, device)
    normed, sum1, mean1, rstd1 = run.norm(
        inner,
        x if residual is None else residual,
        own.out_bias,
        own.middle_weight,
        own.middle_bias,
        seed1,
        how.middle_p,
        how.middle_eps,
        "layer",
        1,
        keeps or opened,
        keeps,
        norm_dtype,
    )
    middle = _in(own.weight1.dtype, normed)
    before = _product(middle, own.weight1, None)
    hidden_seed = _seed(how.hidden_p, device)
    hidden = run.activation(before, own.bias1, hidden_seed, how.hidden_p, how.activation)
    block = _product(hidden, own.weight2, None)
    output, sum2, mean2, rstd2, seed2 = block, None, None, None, None
    if not opened:
        seed2 = _seed(how.last_p, device)
        output, sum2, mean2, rstd2 = run.norm(
            block,
            normed,
            own.bias2,
            own.last_weight,
            own.last_bias,
            seed2,
            how.last_p,
            how.last_eps,
            "layer",
            1,
            keeps,
            keeps,
            norm_dtype,
        )
    kept = None
    if keeps:
        key, value = projected[1:] if len(projected) == 3 else (None, None)
        kept = _Kept(
            source, projected[0], key, value, merged, statistics,
            sum1, mean1, rstd1, middle, before, hidden, sum2, mean2, rstd2, seed, seed1,
            hidden_seed, seed2,
        )  # fmt: skip
    return output, sum1 if opened else None, kept


class _EncoderLayer(torch.autograd.Function):
    """Of ``x``, ``residual`` and the parameters; then settings, terms and the norms' dtype."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor | None]:
        own, (how, terms, norm_dtype) = EncoderParameters(*rest[:-3]), rest[-3:]
        (output, total, kept), ctx.plan = _run(x, residual, own, how, terms, norm_dtype, keeps=True)
        needs = _Needs(*ctx.needs_input_grad[:-3])
        if not saved_as_they_are():
            ctx.plan = None
        if how.checkpoint_activation or not needs.weight2:
            kept = kept._replace(hidden=None)
        if not needs.weight1:
            kept = kept._replace(middle=None)
        if not (needs.in_weight or needs.key_weight or needs.value_weight):
            kept = kept._replace(source=None)
        ctx.save_for_backward(*kept, *own, *terms[:N_TENSORS])
        ctx.needs, ctx.how, ctx.numbers, ctx.shape = needs, how, terms[N_TENSORS:], x.shape
        ctx.set_materialize_grads(False)
        return output, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, sum_grad: Tensor | None) -> tuple[Any, ...]:
        needs, how, shape = ctx.needs, ctx.how, ctx.shape
        if grad is None and sum_grad is None:
            return (None,) * (len(needs) + 3)
        if torch.is_grad_enabled():
            raise RuntimeError(NO_DOUBLE_BACKWARD.format("an encoder layer"))
        saved, numbers, batch = ctx.saved_tensors, ctx.numbers, shape[0] if len(shape) == 3 else 1
        if ctx.plan is None:  # what hooks have kept may have come back with other strides
            saved = tuple(None if t is None else t.contiguous() for t in saved)
        if grad is None:
            assert sum_grad is not None
            grad = torch.zeros_like(sum_grad)
        rows = grad.reshape(-1, shape[-1])
        if sum_grad is not None:
            sum_grad = sum_grad.reshape(-1, shape[-1])

        def args() -> tuple[Any, ...]:
            terms = AttentionTerms(*saved[_OWN:], *numbers)
            own = EncoderParameters(*saved[_KEPT:_OWN])
            return rows, sum_grad, _Kept(*saved[:_KEPT]), own, how, terms, batch, needs

        kind = needs, None if sum_grad is None else (sum_grad.dtype, sum_grad.stride())
        with autocast_off(rows):  # the forward decided on the dtypes
            if may_be_batched():
                x_grad, residual_grad, *found = _backward(*args())
            else:
                x_grad, residual_grad, *found = _launchers().backward.follow(
                    ctx.plan, rows, (sum_grad, *saved), kind, args
                )
        if x_grad is not None:
            x_grad = x_grad.view(shape)
        if residual_grad is not None:
            residual_grad = residual_grad.view(shape)
        return x_grad, residual_grad, *found, None, None, None


_KEPT = len(_Kept._fields)
_OWN = _KEPT + len(EncoderParameters._fields)
_apply = plain_apply(_EncoderLayer)


def _backward(
    grad: Tensor,
    sum_grad: Tensor | None,
    kept: _Kept,
    own: EncoderParameters,
    how: EncoderSettings,
    terms: AttentionTerms,
    batch: int,
    needs: _Needs,
) -> tuple[Tensor | None, ...]:
    """Gradients of ``x``, ``residual`` and the parameters, None where they are not asked for."""
    run, opened = _registered() if may_be_batched() else _launchers(), how.last_eps is None
    found: dict[str, Tensor | None] = dict.fromkeys(_Needs._fields)
    needs_heads = needs.x or any(needs[2:8])
    needs_sum1 = (
        needs_heads
        or needs.residual
        or needs.out_weight
        or needs.out_bias
        or needs.middle_weight
        or needs.middle_bias
    )
    block_grad, through = grad, None
    if not opened:
        through, found["last_weight"], found["last_bias"], found["bias2"], block_grad = (
            _norm_gradients(
                run, grad, None, kept.sum2, kept.mean2, kept.rstd2, own.last_weight, own.last_bias,
                own.bias2, kept.seed2, how.last_p, needs.last_weight, needs.last_bias,
                needs.bias2, kept.before.dtype,
            )
        )  # fmt: skip
    if needs.weight2:
        hidden = kept.hidden
        if hidden is None:
            hidden = run.activation(
                kept.before, own.bias1, kept.hidden_seed, how.hidden_p, how.activation
            )
        found["weight2"] = _weight_gradient(block_grad, hidden)
    if not (needs_sum1 or needs.weight1 or needs.bias1):
        return tuple(found.values())
    before_grad, found["bias1"] = run.activation_backward(
        _add_product(block_grad, own.weight2, None),
        kept.before,
        own.bias1,
        kept.hidden_seed,
        how.hidden_p,
        how.activation,
        needs.bias1,
    )
    if not needs.bias1:
        found["bias1"] = None
    if needs.weight1 and kept.middle is not None:
        found["weight1"] = _weight_gradient(before_grad, kept.middle)
    if not needs_sum1:
        return tuple(found.values())
    residual_grad, found["middle_weight"], found["middle_bias"], found["out_bias"], inner_grad = (
        _norm_gradients(
            run, _add_product(before_grad, own.weight1, through), sum_grad, kept.sum1, kept.mean1,
            kept.rstd1, own.middle_weight, own.middle_bias, own.out_bias, kept.seed1,
            how.middle_p, needs.middle_weight, needs.middle_bias, needs.out_bias,
            kept.projected.dtype,
        )
    )  # fmt: skip
    if needs.residual:
        found["residual"] = residual_grad
    if needs.out_weight:
        found["out_weight"] = _weight_gradient(inner_grad, kept.merged)
    if not needs_heads:
        return tuple(found.values())
    projected: tuple[Tensor, ...] = (kept.projected,)
    if kept.key is not None and kept.value is not None:
        projected = kept.projected, kept.key, kept.value
    grads = run.attention_backward(
        _add_product(inner_grad, own.out_weight, None),
        projected,
        kept.merged,
        kept.statistics,
        batch,
        how.heads,
        terms._replace(seed=kept.seed),
    )
    x_grad = None if opened else residual_grad
    # The last first: what comes by the residual goes from one product to the one before.
    for name, (weight, _), grad in reversed(
        list(zip(_NAMES, _projections(own), grads, strict=False))
    ):
        if getattr(needs, f"{name}_weight") and kept.source is not None:
            found[f"{name}_weight"] = _weight_gradient(grad, kept.source)
        if getattr(needs, f"{name}_bias"):
            found[f"{name}_bias"] = _bias_gradient(grad)
        if needs.x:
            x_grad = _add_product(grad, weight, x_grad)
    if needs.x:
        found["x"] = x_grad
    return tuple(found.values())


_NAMES = "in", "key", "value"


def _projections(own: EncoderParameters) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of the one product, or of query, key and value."""
    if own.key_weight is None or own.value_weight is None:
        return [(own.in_weight, own.in_bias)]
    return [
        (own.in_weight, own.in_bias),
        (own.key_weight, own.key_bias),
        (own.value_weight, own.value_bias),
    ]


def _norm_gradients(
    run: _Launchers,
    grad: Tensor,
    sum_grad: Tensor | None,
    total: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    input_bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    needs_weight: bool,
    needs_bias: bool,
    needs_input_bias: bool,
    input_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Gradients of the residual, weight, bias, what is added to the input, and the input."""
    parameters = weight, bias, input_bias
    dtype = common_dtype([None if t is None else t.dtype for t in parameters])
    needs = needs_weight, needs_bias, needs_input_bias
    residual_grad, input_grad, *grads = run.norm_backward(
        grad, sum_grad, total, mean, rstd, weight, seed, p, "layer", 1, *needs, input_dtype, dtype
    )
    # By the dispatcher, what is left out is an empty tensor.
    differs = seed is not None or input_dtype != residual_grad.dtype
    found = [
        _in(t.dtype, g) if need and t is not None else None
        for g, t, need in zip(grads, parameters, needs, strict=True)
    ]
    return residual_grad, found[0], found[1], found[2], input_grad if differs else residual_grad


class _Launchers(NamedTuple):
    forward: Any  # planners of the functions above
    backward: Any
    attention: Callable[..., Any]
    attention_backward: Callable[..., Any]
    norm: Callable[..., Any]
    norm_backward: Callable[..., Any]
    activation: Callable[..., Any]
    activation_backward: Callable[..., Any]


@functools.cache
def _launchers() -> _Launchers:
    from fusedformer_kernels.attention.self_attention import (
        self_attention_backward,
        self_attention_forward,
    )
    from fusedformer_kernels.rows.activation import (
        bias_activation_backward,
        bias_activation_forward,
    )
    from fusedformer_kernels.rows.norm import norm_backward, norm_forward
    from fusedformer_kernels.runtime.plans import Planner

    return _Launchers(
        Planner(_forward),
        Planner(_backward),
        self_attention_forward,
        self_attention_backward,
        norm_forward,
        norm_backward,
        bias_activation_forward,
        bias_activation_backward,
    )


def _registered() -> _Launchers:
    """The same by the dispatcher, for batches of gradients: it calls the kernels for each."""
    from fusedformer.ops import activation, norm
    from fusedformer.ops.attention import registered

    def attention_backward(
        grad: Tensor,
        projected: tuple[Tensor, ...],
        merged: Tensor,
        statistics: Tensor,
        batch: int,
        heads: int,
        terms: AttentionTerms,
    ) -> tuple[Tensor, ...]:
        dim = merged.shape[1] // heads
        output, output_grad = (
            t.reshape(batch, -1, heads, dim).transpose(1, 2) for t in (merged, grad)
        )
        if len(projected) == 1:
            qkv = projected[0].view(batch, -1, 3, heads, dim)
            found = registered.self_attention_backward(output_grad, qkv, output, statistics, *terms)
            return (found.reshape(projected[0].shape),)
        views = (rows.view(batch, -1, heads, dim).transpose(1, 2) for rows in projected)
        needs = [True] * 3 + [False] * 4
        grads = registered.attention_backward(
            output_grad, None, *views, output, statistics, needs, *terms
        )
        return tuple(
            g.transpose(1, 2).reshape(rows.shape) for g, rows in zip(grads, projected, strict=False)
        )

    return _launchers()._replace(
        attention_backward=attention_backward,
        norm_backward=norm._norm_backward,
        activation=activation._bias_activation,
        activation_backward=activation._bias_activation_backward,
    )
