"""Rotate queries and keys by their positions: the op, its autograd, its backends."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedformer._internal import checks
from fusedformer._internal.backend import chosen_backend
from fusedformer.errors import BadValueError
from fusedformer.ops._registered import nothing, registered
from fusedformer.ops._shared import cast_gradient, no_double_backward


class HeadNorms(NamedTuple):
    """The norm of each head before it is rotated: kind, weights ``[dim]`` and epsilon."""

    norm: str  # "none", "rms" or "layer"
    query_weight: Tensor | None
    query_bias: Tensor | None
    key_weight: Tensor | None
    key_bias: Tensor | None
    eps: float


def rotary_embedding(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    norms: HeadNorms,
    *,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`fusedformer.functional.rotary_embedding`.

    Args:
        query, key: ``[batch, length, heads, dim]``.
        cos, sin: ``[batch or 1, positions, pairs]``.
        positions: ``[batch, length]`` or None.
        norms, interleaved: how heads are normed, and which columns are pairs.
    """
    if chosen_backend(query) == "torch":
        angles = _angles_aten(cos, sin, positions, query.shape[1])
        query = _normed_aten(query, norms.norm, norms.query_weight, norms.query_bias, norms.eps)
        key = _normed_aten(key, norms.norm, norms.key_weight, norms.key_bias, norms.eps)
        return _rotated_aten(query, *angles, interleaved), _rotated_aten(key, *angles, interleaved)
    checks.check_kernel_dtype("rotary_embedding", "query", query)
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise BadValueError(
            "rotary_embedding(): the kernels compute no gradient of 'cos' and 'sin'; detach them, "
            "or run it under fusedformer.backend('torch')"
        )
    weights = norms.query_weight, norms.query_bias, norms.key_weight, norms.key_bias
    found: tuple[Tensor, Tensor] = _rotary(
        query, key, cos, sin, positions, *weights, norms.norm, norms.eps, interleaved
    )
    return found


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads ``[batch, length, ..., dim]`` by ATen.

    ``cos`` and ``sin`` are ``[1 or batch, length, dim]``: tables that have each angle twice.
    """
    shape = *cos.shape[:2], *[1] * (x.dim() - 3), cos.shape[2]
    cos, sin = (table.view(shape)[..., : shape[-1] // 2] for table in (cos, sin))
    return _rotated_aten(x, cos, sin, False)


def _angles_aten(
    cos: Tensor, sin: Tensor, positions: Tensor | None, length: int
) -> tuple[Tensor, Tensor]:
    """Return the angles ``[batch or 1, length, 1, pairs]`` of tokens."""
    if positions is None:
        found = [table[:, :length] for table in (cos, sin)]
    elif cos.shape[0] == 1:
        found = [table[0][positions] for table in (cos, sin)]
    else:
        index = positions[..., None].expand(-1, -1, cos.shape[-1])
        found = [table.gather(1, index) for table in (cos, sin)]
    return found[0][:, :, None], found[1][:, :, None]


def _normed_aten(
    x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    if norm == "none":
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = None if weight is None else weight.to(wide)
    bias = None if bias is None else bias.to(wide)
    if norm == "layer":
        return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps).to(x.dtype)
    normed = F.rms_norm(x.to(wide), x.shape[-1:], weight, eps)
    return (normed if bias is None else normed + bias).to(x.dtype)


def _rotated_aten(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    pairs, wide = cos.shape[-1], torch.promote_types(cos.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)  # and so the products, as in the kernels
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
        parts = [first * cos - second * sin, second * cos + first * sin]
        turned = torch.stack(parts, -1).flatten(-2)
    else:  # in steps as wide as the heads
        others = torch.cat((turned[..., pairs:], turned[..., :pairs]), -1)
        turned = turned * torch.cat((cos, cos), -1) + others * torch.cat((-sin, sin), -1)
    turned = turned.to(x.dtype)
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), -1)


@registered("rotary_embedding")
def _rotary(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    query_weight: Tensor | None,
    query_bias: Tensor | None,
    key_weight: Tensor | None,
    key_bias: Tensor | None,
    norm: str,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    from fusedformer_kernels.rows.rotary import rotary_forward

    weights = query_weight, query_bias, key_weight, key_bias
    return rotary_forward(query, key, cos, sin, positions, weights, norm, eps, interleaved)


@_rotary.register_fake
def _rotary_fake(query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


@registered(
    "rotary_embedding_backward",
    schema="(Tensor query_grad, Tensor key_grad, Tensor query, Tensor key, Tensor cos, Tensor sin, "
    "Tensor? positions, Tensor? query_weight, Tensor? query_bias, Tensor? key_weight, "
    "Tensor? key_bias, str norm, float eps, bool interleaved, bool needs_weights) "
    "-> (Tensor, Tensor, Tensor)",
)
def _rotary_backward(
    query_grad: Tensor,
    key_grad: Tensor,
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    query_weight: Tensor | None,
    query_bias: Tensor | None,
    key_weight: Tensor | None,
    key_bias: Tensor | None,
    norm: str,
    eps: float,
    interleaved: bool,
    needs_weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    from fusedformer_kernels.rows.rotary import rotary_backward

    weights = query_weight, query_bias, key_weight, key_bias
    return rotary_backward(
        query_grad, key_grad, query, key, cos, sin, positions, weights, norm, eps, interleaved,
        needs_weights,
    )  # fmt: skip


@_rotary_backward.register_fake
def _rotary_backward_fake(
    query_grad: Tensor, key_grad: Tensor, query: Tensor, key: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    weights = nothing(query)
    if others[-1] and others[-4] != "none":
        weights = query.new_empty(4, query.shape[-1], dtype=torch.float32)
    return query.new_empty(query.shape), key.new_empty(key.shape), weights


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, *tensors = inputs[:9]
    ctx.norm, ctx.eps, ctx.interleaved = inputs[9:]
    # Without a norm the backward turns gradients back, and reads nothing of what was turned.
    read = (query, key) if ctx.norm != "none" else (None, None)
    ctx.save_for_backward(*read, *tensors)


def _backward(ctx: Any, query_grad: Tensor, key_grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key, *tensors = ctx.saved_tensors
    weights, needs = tensors[3:], ctx.needs_input_grad[5:9]
    settings = ctx.norm, ctx.eps, ctx.interleaved, any(needs)
    if query is None:
        query, key = query_grad, key_grad
    found = _rotary_backward(query_grad, key_grad, query, key, *tensors, *settings)
    query_grad, key_grad, sums = found
    grads = [
        cast_gradient(grad, weight.dtype) if need else None
        for grad, weight, need in zip(
            sums if any(needs) and ctx.norm != "none" else weights, weights, needs, strict=True
        )
    ]
    first, second = ctx.needs_input_grad[:2]
    wanted = (query_grad if first else None, key_grad if second else None)
    return *wanted, None, None, None, *grads, None, None, None


_rotary.register_autograd(_backward, setup_context=_save, only_launches=True)
_rotary_backward.register_autograd(no_double_backward("rotary_embedding"))
